"""Let runs of one kind and data set go one after another, and only the newest of those that wait.

Prefect's own limit on a deployment is not used: its slots stay taken by runs that never start, it
drops the run of one data set because another's is going, and it keeps a whole queue after downtime.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from functools import wraps
from inspect import signature
from typing import Literal, ParamSpec
from uuid import UUID

from prefect import get_run_logger, runtime
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.states import Completed

from tasks.services.clock import server_time
from tasks.services.step import step

P = ParamSpec("P")

TAG = "mnist-retraining"
"""What every deployment, and so every run of ours, is tagged with on a server that others share."""

OVERTAKEN = "Overtaken"
"""Name of the state in which a run ends whose work a newer one does."""

_LOOK_SECONDS = 5.0
_SUBJECT = ("dataset", "store")
_SAME_WORK = {"dataset", "store", "quiet_minutes"}
"""Parameters that a schedule leaves out and an event fills in, with the same meaning."""

Turn = Literal["go", "wait", "overtaken"]


def judge_turn(run: FlowRun, others: Iterable[FlowRun], defaults: Mapping[str, object]) -> Turn:
    """Decide whether a run may go; `others` are the active runs of its deployment that are due.

    Of one data set, the run that started first goes. One that was not begun before is overtaken by
    a newer one of the same parameters: always if the schedule made it, else if it had to wait.
    `defaults` stand for the parameters that a run was not given.
    """
    rivals = [
        other
        for other in others
        if other.id != run.id and _subject(other, defaults) == _subject(run, defaults)
    ]
    ahead = any(
        other.state and other.state.is_running() and _started(other) < _started(run)
        for other in rivals
    )
    newer = any(_wish(other) == _wish(run) and _due(other) > _due(run) for other in rivals)
    if newer and run.run_count <= 1 and (ahead or run.auto_scheduled):
        return "overtaken"
    return "wait" if ahead else "go"


def in_turn(function: Callable[P, State[object]]) -> Callable[P, State[object]]:
    """Let a flow wait for its turn before anything else; an overtaken run ends as Overtaken."""
    form = signature(function)

    @wraps(function)
    def waiting(*arguments: P.args, **parameters: P.kwargs) -> State[object]:
        given = form.bind(*arguments, **parameters)
        given.apply_defaults()
        subject = {name: given.arguments[name] for name in _SUBJECT}
        if overtaken := take_turn(subject):
            return Completed(name=OVERTAKEN, message=overtaken)
        return function(*arguments, **parameters)

    return waiting


@step
def take_turn(subject: dict[str, object]) -> str | None:
    """Wait until this run may go; return a sentence if it was overtaken, None once it may.

    `subject` holds the data set and the store that it is about. A run without a deployment goes at
    once.
    """
    deployment = runtime.deployment.id
    if deployment is None:
        return None
    said = False
    while True:
        with get_client(sync_client=True) as prefect:
            run = prefect.read_flow_run(UUID(str(runtime.flow_run.id)))
            turn = judge_turn(run, _active(prefect, UUID(str(deployment))), subject)
        if turn == "go":
            return None
        if turn == "overtaken":
            return (
                "a newer run for the same data set, with the same parameters, is due: it takes in "
                "all that this one would have"
            )
        if not said:
            get_run_logger().info("waits: another run for the same data set is going")
            said = True
        time.sleep(_LOOK_SECONDS)


def _active(prefect: SyncPrefectClient, deployment: UUID) -> list[FlowRun]:
    """Return the runs of a deployment that have begun or are due, and have not ended.

    Whether one has begun does not depend on a clock, and what is due the server's clock decides.
    """
    begun = FlowRunFilter(state=_in_states(StateType.PENDING, StateType.RUNNING))
    due = FlowRunFilter(
        state=_in_states(StateType.SCHEDULED),
        expected_start_time=FlowRunFilterExpectedStartTime(before_=server_time(prefect)),
    )
    ours = DeploymentFilter(id=DeploymentFilterId(any_=[deployment]))
    return [
        found
        for wanted in (begun, due)
        for found in prefect.read_flow_runs(flow_run_filter=wanted, deployment_filter=ours)
    ]


def _in_states(*types: StateType) -> FlowRunFilterState:
    return FlowRunFilterState(type=FlowRunFilterStateType(any_=list(types)))


def _subject(run: FlowRun, defaults: Mapping[str, object]) -> list[object]:
    given = {**defaults, **run.parameters}
    return [given[name] for name in _SUBJECT]


def _wish(run: FlowRun) -> dict[str, object]:
    """Return what a run was asked for beyond its data set."""
    return {name: value for name, value in run.parameters.items() if name not in _SAME_WORK}


def _started(run: FlowRun) -> tuple[datetime, str]:
    return run.start_time or datetime.max.replace(tzinfo=UTC), str(run.id)


def _due(run: FlowRun) -> tuple[datetime, str]:
    return run.expected_start_time or datetime.min.replace(tzinfo=UTC), str(run.id)
