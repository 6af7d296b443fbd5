"""What is done about runs that died, and who may go on with a run."""

from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest
from prefect import flow, task
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, State, StateType, TaskRun
from prefect.logging import disable_run_logger
from prefect.states import Completed, Crashed, Running

from deployments.stack import Stack
from tasks.runs.attempt import judge_attempt
from tasks.runs.states import GIVEN_UP
from tasks.runs.turn import TAG
from tasks.watch import recovery
from tasks.watch.recovery import judge_run

NOW = datetime(2026, 11, 25, 3, tzinfo=UTC)


def state(kind: str, name: str = "", age: float = 60, message: str = "") -> State:
    when = NOW - timedelta(seconds=age)
    return State(type=StateType[kind], name=name or None, message=message, timestamp=when)


def died(*past: State, age: float = 60, name: str = "", **given: object) -> tuple[str, str]:
    last = state("CRASHED", name, age, "killed")
    run = FlowRun(flow_id=uuid4(), deployment_id=uuid4(), state=last, **given)
    remedy = judge_run(run, [*past, last], NOW)
    return remedy.act, remedy.why


RESUMED = [
    state("SCHEDULED", "AwaitingRetry", 900 - n, f"Resumed after death {n} of at most 3. killed")
    for n in (1, 2, 3)
]


def test_a_run_that_died_is_resumed_three_times_and_then_given_up() -> None:
    running = state("RUNNING", age=1000)
    for deaths in range(3):
        act, why = died(running, *RESUMED[:deaths])
        assert act == "resume"
        assert why.startswith(f"Resumed after death {deaths + 1} of at most 3. killed")
    act, why = died(running, *RESUMED)
    assert act == "give up"
    assert why.startswith("It died 4 times and was resumed 3 times.")


def test_deaths_count_from_when_a_person_repeated_the_run() -> None:
    given_up = state("CRASHED", GIVEN_UP, 500)
    repeated = state("RUNNING", age=400)
    assert died(*RESUMED, given_up, repeated)[1].startswith("Resumed after death 1 of at most 3.")


def test_a_death_is_let_settle_before_the_resume() -> None:
    assert died(state("RUNNING", age=100), age=10)[0] == "wait"


def test_a_run_that_was_given_up_or_died_long_ago_stays_as_it_is() -> None:
    assert died(name=GIVEN_UP)[0] == "nothing"
    assert died(age=25 * 3600)[0] == "nothing"


def test_a_run_that_somebody_cancelled_is_cancelled_and_not_resumed() -> None:
    assert died(state("RUNNING", age=100), state("CANCELLING", age=70))[0] == "cancel"


def test_a_run_that_was_cancelled_and_then_retried_by_a_person_is_resumed() -> None:
    past = [state("RUNNING", age=300), state("CANCELLING", age=200), state("CANCELLED", age=190)]
    assert died(*past, state("RUNNING", age=100))[0] == "resume"


@pytest.mark.parametrize(("age", "act"), [(599, "nothing"), (601, "crash")])
def test_a_run_whose_process_never_starts_is_ended_after_ten_minutes(age: float, act: str) -> None:
    run = FlowRun(flow_id=uuid4(), deployment_id=uuid4(), state=state("PENDING", age=age))
    assert judge_run(run, [], NOW).act == act


def test_a_run_that_belongs_to_no_deployment_is_left_alone() -> None:
    run = FlowRun(flow_id=uuid4(), state=state("CRASHED"))
    assert judge_run(run, [], NOW).act == "nothing"


@pytest.mark.parametrize(
    ("present", "count", "order"),
    [
        (state("RUNNING"), 1, "go on"),
        (state("RUNNING"), 2, "end"),  # a newer attempt runs
        (state("SCHEDULED", "AwaitingRetry"), 1, "end"),  # one is due
        (state("PENDING"), 1, "end"),
        (state("CRASHED"), 1, "say that it goes on"),  # a late report
        (state("CANCELLING", age=5), 1, "go on"),  # the worker ends it
        (state("CANCELLING", age=90), 1, "end as cancelled"),
        (state("CANCELLED"), 1, "end"),
        (state("FAILED"), 1, "end"),
        (None, 1, "end"),
    ],
)
def test_an_attempt_goes_on_only_while_the_run_is_its_own(
    present: State | None, count: int, order: str
) -> None:
    run = FlowRun(flow_id=uuid4(), state=present, run_count=count)
    assert judge_attempt(run, 1, NOW) == order


@flow
def dying() -> None:
    """Stand for a flow whose process dies."""


@task
def at_work() -> None:
    """Stand for what it was at."""


def leave_task_run(prefect: SyncPrefectClient, tag: str, last: State) -> tuple[FlowRun, TaskRun]:
    """Make a run that is at work, by its task run, while the flow run says something else."""
    deployment = prefect.create_deployment(prefect.create_flow(dying), f"test-{uuid4().hex[:8]}")
    run = prefect.create_flow_run_from_deployment(deployment, tags=[tag])
    running: State = Running()
    prefect.set_flow_run_state(run.id, running, force=True)
    left = prefect.create_task_run(at_work, run.id, "0", state=running)
    prefect.set_flow_run_state(run.id, last, force=True)
    return prefect.read_flow_run(run.id), left


def test_what_a_dead_process_was_at_is_shown_as_crashed_once_its_run_is_resumed_or_over(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "_LAST_WORD", timedelta(seconds=-5))  # as if a while had passed
    with get_client(sync_client=True) as prefect:
        died, at_death = leave_task_run(prefect, "test", Crashed())
        recovery._apply(prefect, recovery.Remedy(died, "give up", "It died."))
        _, at_end = leave_task_run(prefect, TAG, Completed())
        _, foreign = leave_task_run(prefect, "another-team", Completed())
        recovery._end_left_behind(prefect)
        states = [prefect.read_task_run(each.id).state for each in (at_death, at_end, foreign)]
    assert [each and each.name for each in states] == ["Crashed", "Crashed", "Running"]


def test_however_many_watches_see_a_death_the_run_is_resumed_once(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A death starts a watch, as its other reports do, and the schedule's may look as well."""
    monkeypatch.setattr(recovery, "_SETTLED", timedelta(0))
    with get_client(sync_client=True) as prefect:
        died, _ = leave_task_run(prefect, TAG, Crashed())
        with disable_run_logger(), ThreadPoolExecutor(4) as watches:
            look = recovery.recover_runs.fn
            for seen in [watches.submit(copy_context().run, look) for _ in range(4)]:
                seen.result()
        states = prefect.read_flow_run_states(died.id)
    assert [str(state.message).startswith("Resumed after") for state in states].count(True) == 1
