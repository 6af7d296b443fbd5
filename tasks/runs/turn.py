"""Let runs of one kind and data set go one after another, and only the newest of those that wait.

Prefect's own limit on a deployment is not used: its slots stay taken by runs that never start, it
drops the run of one data set because another's is going, and it keeps a whole queue after downtime.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
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
    FlowRunFilterEndTime,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.states import Completed

from tasks.runs.attempt import attempt
from tasks.runs.states import GIVEN_UP, began
from tasks.services.clock import server_time
from tasks.services.step import step

P = ParamSpec("P")

TAG = "mnist-retraining"
"""What every deployment, and so every run of ours, is tagged with on a server that others share."""

OVERTAKEN = "Overtaken"
"""Name of the state in which a run ends whose work a newer one does."""

_SETTLED = timedelta(seconds=20)
"""A run that is called crashed may be alive, and has contradicted the report by then."""

_LOOK_SECONDS = 5.0
_SUBJECT = ("dataset", "store")
_SAME_WORK = {"dataset", "store", "quiet_minutes"}
"""Parameters that a schedule leaves out and an event fills in, with the same meaning."""

Turn = Literal["go", "wait", "overtaken"]


@dataclass(frozen=True)
class Contender:
    """A run of a deployment that is due, goes, or is said to have died just now."""

    run: FlowRun
    began: datetime | None
    """Start of its present attempt; None if it has none."""


def judge_turn(run: Contender, others: Iterable[Contender], defaults: Mapping[str, object]) -> Turn:
    """Decide whether a run may go; `others` are those of its deployment.

    Of one data set, the run whose attempt began first goes: one that is resumed after a death goes
    on once the one that went meanwhile has ended. A run that was not begun before is overtaken by a
    newer one of the same parameters: always if the schedule made it, else if it had to wait.
    `defaults` are the flow's own, for the parameters that a run was not given.
    """
    rivals = [
        other
        for other in others
        if other.run.id != run.run.id
        and _subject(other.run, defaults) == _subject(run.run, defaults)
    ]
    ahead = any(other.began and _place(other) < _place(run) for other in rivals)
    newer = any(
        _wish(other.run) == _wish(run.run) and _due(other.run) > _due(run.run)
        for other in rivals
        if other.run.state and not other.run.state.is_crashed()
    )
    if newer and run.run.run_count <= 1 and (ahead or run.run.auto_scheduled):
        return "overtaken"
    return "wait" if ahead else "go"


def in_turn(function: Callable[P, State[object]]) -> Callable[P, State[object]]:
    """Let a flow wait for its turn before anything else; an overtaken run ends as Overtaken."""
    form = signature(function).parameters
    defaults: dict[str, object] = {name: form[name].default for name in _SUBJECT}

    @wraps(function)
    def waiting(*arguments: P.args, **parameters: P.kwargs) -> State[object]:
        with attempt():  # without a limit: waiting does not count
            if overtaken := take_turn(defaults):
                return Completed(name=OVERTAKEN, message=overtaken)
            return function(*arguments, **parameters)

    return waiting


@step
def take_turn(defaults: dict[str, object]) -> str | None:
    """Wait until this run may go; return a sentence if it was overtaken, None once it may.

    `defaults` are the flow's own data set and store. A run without a deployment goes at once.
    """
    deployment = runtime.deployment.id
    if deployment is None:
        return None
    said = False
    while True:
        with get_client(sync_client=True) as prefect:
            others = _find_contenders(prefect, UUID(str(deployment)))
            run = _enter(prefect, prefect.read_flow_run(UUID(str(runtime.flow_run.id))))
            turn = judge_turn(run, others, defaults)
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


def _find_contenders(prefect: SyncPrefectClient, deployment: UUID) -> list[Contender]:
    """Return the runs of a deployment that have begun or are due, and have not ended for good.

    Whether one has begun does not depend on a clock, and what is due the server's clock decides.
    """
    now = server_time(prefect)
    begun = FlowRunFilter(state=_in_states(StateType.PENDING, StateType.RUNNING))
    due = FlowRunFilter(
        state=_in_states(StateType.SCHEDULED),
        expected_start_time=FlowRunFilterExpectedStartTime(before_=now),
    )
    dead = FlowRunFilter(
        state=_in_states(StateType.CRASHED),
        end_time=FlowRunFilterEndTime(after_=now - _SETTLED),
    )
    ours = DeploymentFilter(id=DeploymentFilterId(any_=[deployment]))
    return [
        _enter(prefect, found)
        for wanted in (begun, due, dead)
        for found in prefect.read_flow_runs(flow_run_filter=wanted, deployment_filter=ours)
        if found.state_name != GIVEN_UP
    ]


def _enter(prefect: SyncPrefectClient, run: FlowRun) -> Contender:
    goes = run.state is not None and (run.state.is_running() or run.state.is_crashed())
    if run.run_count <= 1 or not goes:
        return Contender(run, run.start_time if goes else None)
    return Contender(run, began(prefect.read_flow_run_states(run.id)))


def _in_states(*types: StateType) -> FlowRunFilterState:
    return FlowRunFilterState(type=FlowRunFilterStateType(any_=list(types)))


def _subject(run: FlowRun, defaults: Mapping[str, object]) -> list[object]:
    given = {**defaults, **run.parameters}
    return [given[name] for name in _SUBJECT]


def _wish(run: FlowRun) -> dict[str, object]:
    """Return what a run was asked for beyond its data set."""
    return {name: value for name, value in run.parameters.items() if name not in _SAME_WORK}


def _place(contender: Contender) -> tuple[datetime, str]:
    return contender.began or datetime.max.replace(tzinfo=UTC), str(contender.run.id)


def _due(run: FlowRun) -> tuple[datetime, str]:
    return run.expected_start_time or datetime.min.replace(tzinfo=UTC), str(run.id)
