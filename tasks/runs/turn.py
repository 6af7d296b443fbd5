"""Turns: for each deployment and data set one run at a time, and of those that wait the newest.

Prefect's own limit on a deployment is not used: its slots stay taken by runs that never start, it
drops the run of one data set while another's is going, and it keeps a whole queue after downtime.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
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
from prefect.exceptions import ObjectNotFound
from prefect.states import Completed

from tasks.runs.attempt import attempt
from tasks.runs.states import GIVEN_UP, began
from tasks.services.clock import server_time
from tasks.services.step import step

P = ParamSpec("P")

TAG = "mnist-retraining"
"""Tag of all deployments of this project, and so of their runs, on a server that others share."""

OVERTAKEN = "Overtaken"
"""Name of the state in which a run ends because a newer one does its work."""

_SETTLED = timedelta(seconds=20)
"""A run that was reported as crashed may be alive, and has contradicted the report by then."""

_POLL_SECONDS = 5.0
_AUTO = ({"auto", "mnist"}, {"auto", "digits"})
_SUBJECT = ("dataset", "store")
"""Parameters in which two runs agree that must not go at the same time."""
_SAME_WORK = {"dataset", "store", "quiet_minutes", "time_limit_minutes"}
"""Parameters that a schedule leaves out and an event fills in; none makes it other work."""

_NEWER = (
    "a newer run for the same data set, with the same parameters, is due: it takes in all that "
    "this one would have"
)

Turn = Literal["go", "wait", "overtaken"]


@dataclass(frozen=True)
class Contender:
    """A run of a deployment that is due, has begun, or was reported as crashed just now."""

    run: FlowRun
    began: datetime | None
    """Start of its present attempt; None if it has not begun."""


def judge_turn(run: Contender, others: Iterable[Contender], defaults: Mapping[str, object]) -> Turn:
    """Return the turn of a run among `others`, the runs of its deployment.

    Of one data set, the run whose attempt began first goes: one that is resumed after a death
    continues once the one that went meanwhile has ended. A run in its first attempt is overtaken by
    a newer one with the same parameters: always if a schedule made it, otherwise if it had to wait.
    `defaults` are the flow's own, for the parameters that a run was not given.
    """
    rivals = [
        other
        for other in others
        if other.run.id != run.run.id
        and _same_subject(_subject(other.run, defaults), _subject(run.run, defaults))
    ]
    ahead = any(other.began and _rank(other) < _rank(run) for other in rivals)
    # A crashed run may not come back, so it overtakes nothing.
    newer = any(
        _work(other.run) == _work(run.run) and _due(other.run) > _due(run.run)
        for other in rivals
        if other.run.state and not other.run.state.is_crashed()
    )
    if newer and run.run.run_count <= 1 and (ahead or run.run.auto_scheduled):
        return "overtaken"
    return "wait" if ahead else "go"


def find_overtaken(
    run: Contender, others: Iterable[Contender], defaults: Mapping[str, object]
) -> list[Contender]:
    """Return the runs that a schedule made, that `run` overtakes, and that no worker has taken yet.

    They end without a process of their own: after a weekend without a worker thousands are due.
    """
    return [
        other
        for other in others
        if other.run.state
        and other.run.state.is_scheduled()
        and other.run.auto_scheduled
        and not other.run.run_count
        and _same_subject(_subject(other.run, defaults), _subject(run.run, defaults))
        and _work(other.run) == _work(run.run)
        and _due(other.run) < _due(run.run)
    ]


def end_overtaken(prefect: SyncPrefectClient, overtaken: Iterable[Contender]) -> None:
    """End runs as Overtaken; one that was deleted meanwhile, as by an edited schedule, is left."""
    for each in overtaken:
        with suppress(ObjectNotFound):
            prefect.set_flow_run_state(each.run.id, Completed(name=OVERTAKEN, message=_NEWER))


def in_turn(function: Callable[P, State[object]]) -> Callable[P, State[object]]:
    """Make a flow wait for its turn before anything else; an overtaken run ends as Overtaken."""
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
    """Wait for this run's turn; return None when it has come, or the reason if it was overtaken.

    `defaults` are the flow's own data set and store. A run without a deployment goes at once.
    """
    deployment = runtime.deployment.id
    if deployment is None:
        return None
    logged = False
    while True:
        with get_client(sync_client=True) as prefect:
            others = _find_contenders(prefect, UUID(str(deployment)))
            run = _contender(prefect, prefect.read_flow_run(UUID(str(runtime.flow_run.id))))
            turn = judge_turn(run, others, defaults)
            end_overtaken(prefect, find_overtaken(run, others, defaults))
        if turn == "go":
            return None
        if turn == "overtaken":
            return _NEWER
        if not logged:
            get_run_logger().info("waits: another run for the same data set is going")
            logged = True
        time.sleep(_POLL_SECONDS)


def _find_contenders(prefect: SyncPrefectClient, deployment: UUID) -> list[Contender]:
    """Return the runs of a deployment that have begun or are due, and have not ended for good.

    A run that has begun is found by its state, which needs no clock; due is decided by the server's
    clock.
    """
    now = server_time(prefect)
    begun = FlowRunFilter(state=_in_states(StateType.PENDING, StateType.RUNNING))
    due = FlowRunFilter(
        state=_in_states(StateType.SCHEDULED),
        expected_start_time=FlowRunFilterExpectedStartTime(before_=now),
    )
    # It may be alive and about to contradict the report, so for a while it still has its turn.
    dead = FlowRunFilter(
        state=_in_states(StateType.CRASHED),
        end_time=FlowRunFilterEndTime(after_=now - _SETTLED),
    )
    ours = DeploymentFilter(id=DeploymentFilterId(any_=[deployment]))
    return [
        _contender(prefect, found)
        for wanted in (begun, due, dead)
        for found in prefect.read_flow_runs(flow_run_filter=wanted, deployment_filter=ours)
        if found.state_name != GIVEN_UP
    ]


def _contender(prefect: SyncPrefectClient, run: FlowRun) -> Contender:
    # `start_time` is the start of the first attempt. That of a later one is read from the states,
    # which costs a request each.
    goes = run.state is not None and (run.state.is_running() or run.state.is_crashed())
    if run.run_count <= 1 or not goes:
        return Contender(run, run.start_time if goes else None)
    return Contender(run, began(prefect.read_flow_run_states(run.id)))


def _in_states(*types: StateType) -> FlowRunFilterState:
    return FlowRunFilterState(type=FlowRunFilterStateType(any_=list(types)))


def _subject(run: FlowRun, defaults: Mapping[str, object]) -> tuple[str, str]:
    """Return the data set and the store of a run."""
    given = {**defaults, **run.parameters}
    return str(given["dataset"]), str(given["store"]).rstrip("/")


def _same_subject(one: tuple[str, str], other: tuple[str, str]) -> bool:
    """Return True if two runs may work on one data set; `auto` is any that it may become."""
    datasets = {one[0], other[0]}
    return one[1] == other[1] and (len(datasets) == 1 or datasets in _AUTO)


def _work(run: FlowRun) -> dict[str, object]:
    """Return the parameters that define a run's work beyond its data set."""
    return {name: value for name, value in run.parameters.items() if name not in _SAME_WORK}


def _rank(contender: Contender) -> tuple[datetime, str]:
    # The id breaks a tie in the same way for every run that decides on its turn.
    return contender.began or datetime.max.replace(tzinfo=UTC), str(contender.run.id)


def _due(run: FlowRun) -> tuple[datetime, str]:
    return run.expected_start_time or datetime.min.replace(tzinfo=UTC), str(run.id)
