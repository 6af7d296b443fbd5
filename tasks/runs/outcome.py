"""What a flow run has settled stays settled, however often the run is resumed or retried.

    STORE/runs/FLOW_RUN/outcome.json   the state that the run ended in, written before it ends
    STORE/runs/FLOW_RUN/NAME.json      what a step fixed for the run before it acted on it

Only a state of type COMPLETED is an outcome. A run that failed, say for rejected data, is there to
be repaired and retried.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from functools import wraps
from inspect import signature
from typing import Literal, ParamSpec, TypeVar

from prefect import get_run_logger, runtime
from prefect.client.schemas import State
from prefect.client.schemas.objects import StateType
from pydantic import BaseModel, ValidationError

from tasks.services.s3 import Store
from tasks.services.step import step

P = ParamSpec("P")
Record = TypeVar("Record", bound=BaseModel)

_OUTCOME = "outcome"


class Outcome(BaseModel, frozen=True):
    """How a flow run ended."""

    format: Literal[1] = 1
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
    """Let a flow that has ended do nothing again: a retry returns the outcome on record.

    The flow has a parameter `store`, which keeps the record.
    """
    form = signature(function)

    @wraps(function)
    def ending_once(*arguments: P.args, **parameters: P.kwargs) -> State[object]:
        given = form.bind(*arguments, **parameters)
        given.apply_defaults()
        store = given.arguments["store"]
        if earlier := find_outcome(store):
            return earlier.state
        state = function(*arguments, **parameters)
        if state.is_completed():
            record_outcome(str(state.name), str(state.message), store)
        return state

    return ending_once


@step
def find_outcome(store: str) -> Outcome | None:
    """Return how this flow run ended before; None if it did not, or failed."""
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


def read_record(store: Store, name: str, kind: type[Record]) -> Record | None:
    """Return what was fixed under a name for this flow run; None if nothing was.

    Raises ValueError if the record is there and cannot be read: nobody knows then what was done.
    """
    path = _path(name)
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


def write_record(store: Store, name: str, record: BaseModel) -> None:
    """Fix something under a name for this flow run."""
    store.put(_path(name), record.model_dump_json(indent=1).encode())


def _path(name: str) -> str:
    return f"runs/{runtime.flow_run.id}/{name}.json"
