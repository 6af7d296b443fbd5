"""Records of a flow run, which hold through every resume and retry.

The outcome is the state that the run ended in, written before it ends. Any other record is a choice
that a step fixed for the run before acting on it.

Only a state of type COMPLETED is an outcome. A run that failed, for example for rejected data, is
to be repaired and retried.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from functools import wraps
from inspect import signature
from typing import Literal, ParamSpec, TypeVar

from prefect import get_run_logger, runtime
from prefect.client.schemas import State
from prefect.client.schemas.objects import StateType
from pydantic import ValidationError

from mnist_cnn.record import Record
from tasks import keys
from tasks.services.s3 import Store
from tasks.services.step import step

P = ParamSpec("P")
R = TypeVar("R", bound=Record)

_OUTCOME = "outcome"


class Outcome(Record):
    """State in which a flow run completed."""

    name: str
    """Name of its state."""
    type: Literal["COMPLETED"]
    message: str
    when: datetime

    @property
    def state(self) -> State[object]:
        """The state that the flow returns."""
        return State(type=StateType(self.type), name=self.name, message=self.message)


def once(function: Callable[P, State[object]]) -> Callable[P, State[object]]:
    """Make a flow run complete only once: a retry returns the outcome on record.

    The flow has a parameter `store`, the address of the store with the record.
    """
    form = signature(function)

    @wraps(function)
    def ending_once(*arguments: P.args, **parameters: P.kwargs) -> State[object]:
        bound = form.bind(*arguments, **parameters)
        bound.apply_defaults()
        store = bound.arguments["store"]
        if earlier := find_outcome(store):
            return earlier.state
        state = function(*arguments, **parameters)
        # Recorded before it is returned: a run that dies in between is resumed, and finds it.
        if state.is_completed():
            record_outcome(str(state.name), str(state.message), store)
        return state

    return ending_once


@step
def find_outcome(store: str) -> Outcome | None:
    """Return the outcome of this flow run; None if it has not ended, or failed."""
    outcome = read_record(Store(store), _OUTCOME, Outcome)
    if outcome:
        get_run_logger().info(
            "this run ended on %s as %s; a retry changes nothing: start a new run instead",
            f"{outcome.when:%Y-%m-%d %H:%M} UTC",
            outcome.name,
        )
    return outcome


@step
def record_outcome(name: str, message: str, store: str) -> None:
    """Record the state that this flow run is about to end in."""
    outcome = Outcome(name=name, type="COMPLETED", message=message, when=datetime.now(UTC))
    write_record(Store(store), _OUTCOME, outcome)


def read_record(store: Store, name: str, kind: type[R]) -> R | None:
    """Return the record under a name for this flow run; None if there is none.

    Raises ValueError if there is one that cannot be read: the work that was done is then unknown.
    """
    path = keys.record(runtime.flow_run.id, name)
    try:
        return kind.model_validate_json(store.get(path))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise ValueError(
            f"{store.address_of(path)} is no record that this version of the code can read "
            f"({error.errors()[0]['msg']}), so nobody knows what this run has done; nothing was "
            "changed: look at what the run did, and start a new one"
        ) from error


def write_record(store: Store, name: str, record: Record) -> None:
    """Write a record under a name for this flow run."""
    path = keys.record(runtime.flow_run.id, name)
    store.put(path, record.model_dump_json(indent=1).encode())
