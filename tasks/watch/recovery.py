"""Resume the runs that died: the same flow run continues, at most three times.

Prefect retries a run that raises, within its process. If the process is killed, or the worker or
the machine goes away, nothing is raised: the worker or the missing heartbeat sets the run to
Crashed, and there it stays. Here such a run is scheduled again; its finished work lies in S3 and
MLflow.
"""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from prefect import get_run_logger
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterEndTime,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
    TaskRunFilter,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound
from prefect.states import AwaitingRetry, Cancelled, Crashed

from tasks.runs.states import GIVEN_UP, since_end, since_running
from tasks.runs.turn import TAG
from tasks.services.clock import server_time
from tasks.services.lock import exclusive
from tasks.services.step import step

RESUMES = 3
"""Number of times that a run is resumed after a death."""

_RESUMED = "Resumed after"
"""Beginning of the message of the state that resumes a run; its resumes are counted by it."""
_PENDING = timedelta(minutes=10)
_SETTLED = timedelta(seconds=12)
"""A death is reported more than once, by engine and worker; no report may come after the resume.
And an attempt that is alive, which polls every four seconds, has contradicted the report by then.
"""
_LAST_WORD = timedelta(minutes=1)
"""A task run may report its own end up to a minute after that of its flow run. A resume is dated as
far back, so that it is due at once."""
_MOST_SECONDS = 120.0
_FRESH = timedelta(days=1)
"""An older death is left to people: the next run of the schedule did its work."""

Act = Literal["nothing", "wait", "resume", "give up", "cancel", "crash"]


@dataclass(frozen=True)
class Remedy:
    """An action on a run, with its reason."""

    run: FlowRun
    act: Act
    why: str


def judge_run(run: FlowRun, past: Sequence[State], now: datetime) -> Remedy:
    """Return the remedy for a run of a deployment; `past` are all its states, in any order."""
    state = run.state
    if state is None or run.deployment_id is None:
        return Remedy(run, "nothing", "")
    age = now - state.timestamp
    if state.is_pending() and age > _PENDING:
        return Remedy(run, "crash", "Its process did not start within 10 minutes.")
    if state.is_crashed() and state.name != GIVEN_UP and age < _FRESH:
        return _judge_death(run, state, past, settled=age > _SETTLED)
    return Remedy(run, "nothing", "")


def _judge_death(run: FlowRun, state: State, past: Sequence[State], *, settled: bool) -> Remedy:
    # A worker that cancels a run kills its process, which may be reported as a crash.
    if any(earlier.is_cancelling() for earlier in since_running(past)):
        return Remedy(run, "cancel", "It was cancelled, and its process ended for that.")
    if not settled:
        return Remedy(run, "wait", "")
    resumes = sum(str(earlier.message).startswith(_RESUMED) for earlier in since_end(past))
    if resumes >= RESUMES:
        why = f"It died {resumes + 1} times and was resumed {RESUMES} times. {state.message}"
        return Remedy(run, "give up", why)
    why = f"{_RESUMED} death {resumes + 1} of at most {RESUMES}. {state.message}"
    return Remedy(run, "resume", why)


@step
def recover_runs() -> list[str]:
    """Resume crashed runs and end those that never started; return a sentence for each run.

    It waits, two minutes at most, for deaths that are not settled yet: the next pass may be that
    far away.
    """
    done = list[Remedy]()
    ends = time.monotonic() + _MOST_SECONDS
    with get_client(sync_client=True) as prefect:
        while time.monotonic() < ends:
            acts = {remedy.act for remedy in _judge_all(prefect)}
            if acts - {"nothing", "wait"}:  # others that are settled later must not hold these up
                done += _act(prefect)
            elif "wait" in acts:
                time.sleep(1)
            else:
                break
        _end_left_behind(prefect)
    sentences = [f"{remedy.act} {remedy.run.name}: {remedy.why}" for remedy in done]
    for sentence in sentences:
        get_run_logger().warning(sentence)
    return sentences


def _act(prefect: SyncPrefectClient) -> list[Remedy]:
    """Judge again and apply the remedies under a lock: every death starts several watches."""
    with exclusive("runs", "recover"):
        remedies = [r for r in _judge_all(prefect) if r.act not in {"nothing", "wait"}]
        for remedy in remedies:
            with suppress(ObjectNotFound):  # the run was deleted since
                _apply(prefect, remedy)
    return remedies


def _judge_all(prefect: SyncPrefectClient) -> list[Remedy]:
    """Judge our runs that are Crashed or Pending, the newest 200 of them."""
    # 200 is the server's default for the length of one answer.
    now = server_time(prefect)
    types = FlowRunFilterStateType(any_=[StateType.CRASHED, StateType.PENDING])
    ours = FlowRunFilter(tags=FlowRunFilterTags(all_=[TAG]), state=FlowRunFilterState(type=types))
    found = prefect.read_flow_runs(flow_run_filter=ours, sort=FlowRunSort.EXPECTED_START_TIME_DESC)
    return [
        judge_run(run, prefect.read_flow_run_states(run.id), now)
        for run in found
        if run.state and run.state.name != GIVEN_UP and now - run.state.timestamp < _FRESH
    ]


def _apply(prefect: SyncPrefectClient, remedy: Remedy) -> None:
    states: dict[Act, State] = {
        # By the server's clock: by that of a machine that is ahead it would be due tomorrow.
        "resume": AwaitingRetry(
            scheduled_time=server_time(prefect) - _LAST_WORD, message=remedy.why
        ),
        "give up": Crashed(name=GIVEN_UP, message=remedy.why),
        "cancel": Cancelled(message=remedy.why),
        "crash": Crashed(message=remedy.why),
    }
    # A remedy is for one state: a run that has changed its state since is left alone.
    present = prefect.read_flow_run(remedy.run.id).state
    if (
        remedy.act in states
        and present
        and present.id == (remedy.run.state and remedy.run.state.id)
    ):
        _end_task_runs(prefect, FlowRunFilter(id=FlowRunFilterId(any_=[remedy.run.id])))
        prefect.set_flow_run_state(remedy.run.id, states[remedy.act], force=True)


def _end_left_behind(prefect: SyncPrefectClient) -> None:
    """Set to Crashed the task runs that ended runs left unfinished, as when a time limit struck.

    A minute later, because a task run may report its own end after that of its flow run.
    """
    over = [StateType.COMPLETED, StateType.FAILED, StateType.CANCELLED]
    ended = FlowRunFilter(
        tags=FlowRunFilterTags(all_=[TAG]),
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=over)),
        end_time=FlowRunFilterEndTime(before_=server_time(prefect) - _LAST_WORD),
    )
    _end_task_runs(prefect, ended)


def _end_task_runs(prefect: SyncPrefectClient, runs: FlowRunFilter) -> None:
    """Set the task runs that died with their process to Crashed.

    Nothing else does, and the UI would show them as running for ever. A resumed run makes new ones.
    """
    types = TaskRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING])
    going = TaskRunFilter(state=TaskRunFilterState(type=types))
    for task_run in prefect.read_task_runs(flow_run_filter=runs, task_run_filter=going):
        crashed: State = Crashed(message="Its process died.")
        with suppress(ObjectNotFound):  # it was deleted since
            prefect.set_task_run_state(task_run.id, crashed, force=True)
