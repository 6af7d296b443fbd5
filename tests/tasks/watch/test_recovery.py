"""What is done about runs that died, and who may go on with a run."""

from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest
from prefect import flow, task
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, State, StateType, TaskRun
from prefect.states import Completed, Crashed, Running

from deployments.stack import Stack
from tasks.runs.attempt import judge_attempt
from tasks.runs.turn import TAG, judge_turn
from tasks.watch import recovery
from tasks.watch.recovery import GIVEN_UP, judge_run

NOW = datetime(2026, 11, 25, 3, tzinfo=UTC)
DEFAULTS = {"dataset": "mnist", "store": "s3://a"}


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


def test_a_death_is_let_settle_before_the_resume() -> None:
    assert died(state("RUNNING", age=100), age=5)[0] == "wait"


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


def run_of(number: int, *, started: float | None, due: float, **given: object) -> FlowRun:
    """Return a run that was due and began so many seconds after NOW."""
    return FlowRun(
        id=UUID(int=number),
        flow_id=UUID(int=0),
        state=state("SCHEDULED" if started is None else "RUNNING"),
        start_time=None if started is None else NOW + timedelta(seconds=started),
        expected_start_time=NOW + timedelta(seconds=due),
        run_count=0 if started is None else 1,
        **{"auto_scheduled": True, "parameters": {}, **given},
    )


def test_the_first_goes_and_a_later_one_waits() -> None:
    first, second = run_of(1, started=0, due=0), run_of(2, started=5, due=5)
    assert judge_turn(second, [first, second], DEFAULTS) == "wait"
    begun = first.model_copy(update={"auto_scheduled": False})
    assert judge_turn(begun, [first, second], DEFAULTS) == "go"


def test_runs_that_start_at_the_same_moment_go_one_after_another() -> None:
    runs = [run_of(n, started=0, due=0, auto_scheduled=False) for n in (1, 2, 3)]
    assert [judge_turn(run, runs, DEFAULTS) for run in runs].count("go") == 1


def test_after_weeks_of_downtime_the_newest_goes_and_the_others_are_overtaken() -> None:
    weeks = [run_of(n, started=n / 10, due=n * 604_800) for n in (1, 2, 3)]
    turns = [judge_turn(run, weeks, DEFAULTS) for run in weeks]
    assert turns == ["overtaken", "overtaken", "wait"]
    assert judge_turn(weeks[2], [weeks[2]], DEFAULTS) == "go"


def test_of_those_that_wait_only_the_newest_stays() -> None:
    going = run_of(1, started=0, due=0, auto_scheduled=False)
    waiting = run_of(2, started=5, due=5, auto_scheduled=False)
    newer = run_of(3, started=None, due=6, auto_scheduled=False)
    assert judge_turn(waiting, [going, waiting, newer], DEFAULTS) == "overtaken"


def test_data_sets_do_not_wait_for_each_other() -> None:
    going = run_of(1, started=0, due=0)
    other = run_of(2, started=5, due=5, parameters={"dataset": "letters"})
    assert judge_turn(other, [going, other], DEFAULTS) == "go"


def test_a_run_of_other_parameters_overtakes_nothing() -> None:
    plain, forced = run_of(1, started=0, due=0), run_of(2, started=1, due=1)
    forced = forced.model_copy(update={"parameters": {"force": True}})
    assert judge_turn(plain, [plain, forced], DEFAULTS) == "go"


def test_a_default_that_an_event_wrote_out_is_no_other_parameter() -> None:
    plain = run_of(1, started=0, due=0)
    spelled = run_of(2, started=1, due=1, parameters={"dataset": "mnist", "quiet_minutes": 10})
    assert judge_turn(plain, [plain, spelled], DEFAULTS) == "overtaken"


def test_a_run_that_was_begun_before_is_not_overtaken() -> None:
    resumed = run_of(1, started=0, due=0).model_copy(update={"run_count": 2})
    newer = run_of(2, started=5, due=5)
    assert judge_turn(resumed, [resumed, newer], DEFAULTS) == "go"


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
