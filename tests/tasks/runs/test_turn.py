from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.exceptions import ObjectNotFound
from prefect.states import Completed

from tasks.runs.states import GIVEN_UP, began, since_end
from tasks.runs.turn import Contender, end_overtaken, find_overtaken, in_turn, judge_turn

NOW = datetime(2026, 11, 2, 3, tzinfo=UTC)
DEFAULTS = {"dataset": "mnist", "store": "s3://a"}


def run_of(number: int, *, started: float | None, due: float, **given: object) -> Contender:
    """Return a run that was due and began so many seconds after NOW."""
    began = None if started is None else NOW + timedelta(seconds=started)
    run = FlowRun(
        id=UUID(int=number),
        flow_id=UUID(int=0),
        state=State(type=StateType.SCHEDULED if began is None else StateType.RUNNING),
        start_time=began,
        expected_start_time=NOW + timedelta(seconds=due),
        **{
            "run_count": 0 if started is None else 1,
            "auto_scheduled": True,
            "parameters": {},
            **given,
        },
    )
    return Contender(run, began)


def test_the_first_goes_and_a_later_one_waits() -> None:
    first, second = run_of(1, started=0, due=0), run_of(2, started=5, due=5)
    assert judge_turn(second, [first, second], DEFAULTS) == "wait"
    begun = run_of(1, started=0, due=0, auto_scheduled=False)
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


def test_a_data_set_has_one_turn_however_it_is_named() -> None:
    mnist = run_of(1, started=0, due=0, auto_scheduled=False)
    for named in ({"dataset": "auto"}, {"store": "s3://a/"}):
        other = run_of(2, started=5, due=5, parameters=named)
        assert judge_turn(other, [mnist, other], DEFAULTS) == "wait"
    digits = run_of(3, started=5, due=5, parameters={"dataset": "digits"})
    assert judge_turn(digits, [mnist, digits], DEFAULTS) == "go"


def test_a_limit_of_its_own_makes_no_other_work() -> None:
    going = run_of(1, started=0, due=0, auto_scheduled=False)
    waiting = run_of(2, started=5, due=5, parameters={"time_limit_minutes": 5})
    newer = run_of(3, started=None, due=6)
    assert judge_turn(waiting, [going, waiting, newer], DEFAULTS) == "overtaken"


def test_a_run_ends_the_older_ones_that_no_worker_has_taken() -> None:
    late = [run_of(n, started=None, due=n * 120) for n in range(1, 6)]
    other = run_of(7, started=None, due=0, parameters={"dataset": "letters"})
    typed = run_of(8, started=None, due=0, auto_scheduled=False)
    taken = run_of(9, started=1, due=0)
    found = find_overtaken(late[2], [*late, other, typed, taken], DEFAULTS)
    assert [each.run.id.int for each in found] == [1, 2]


def test_an_overtaken_run_that_was_deleted_meanwhile_keeps_no_other_from_its_end() -> None:
    ended: list[tuple[int, str]] = []

    def set_state(run: UUID, state: State[object]) -> None:
        if run.int == 1:
            raise ObjectNotFound(http_exc=Exception("deleted"))
        ended.append((run.int, str(state.name)))

    prefect: Any = SimpleNamespace(set_flow_run_state=set_state)
    end_overtaken(prefect, [run_of(n, started=None, due=n) for n in (1, 2)])
    assert ended == [(2, "Overtaken")]


def test_the_default_data_set_of_one_run_is_not_that_of_another() -> None:
    letters = {"dataset": "letters"}
    weekly, theirs = run_of(1, started=0, due=0), run_of(2, started=1, due=0, parameters=letters)
    assert judge_turn(theirs, [weekly, theirs], DEFAULTS) == "go"
    assert judge_turn(weekly, [weekly, theirs], DEFAULTS) == "go"


def test_a_run_that_is_called_dead_keeps_its_turn_until_it_surely_is() -> None:
    dead = run_of(1, started=0, due=0, auto_scheduled=False)
    assert dead.run.state is not None
    dead.run.state.type = StateType.CRASHED
    waiting = run_of(2, started=5, due=5, auto_scheduled=False)
    assert judge_turn(waiting, [dead, waiting], DEFAULTS) == "wait"
    due_again = run_of(1, started=None, due=0, auto_scheduled=False, run_count=1)
    assert judge_turn(waiting, [due_again, waiting], DEFAULTS) == "go"
    resumed = run_of(1, started=9, due=0, auto_scheduled=False, run_count=2)
    assert judge_turn(resumed, [resumed, waiting], DEFAULTS) == "wait"
    assert judge_turn(waiting, [resumed, waiting], DEFAULTS) == "go"


def test_a_run_of_other_parameters_overtakes_nothing() -> None:
    plain = run_of(1, started=0, due=0)
    forced = run_of(2, started=1, due=1, parameters={"force": True})
    assert judge_turn(plain, [plain, forced], DEFAULTS) == "go"


def test_a_default_that_an_event_wrote_out_is_no_other_parameter() -> None:
    plain = run_of(1, started=0, due=0)
    spelled = run_of(2, started=1, due=1, parameters={"dataset": "mnist", "quiet_minutes": 10})
    assert judge_turn(plain, [plain, spelled], DEFAULTS) == "overtaken"


def test_a_run_that_was_begun_before_is_not_overtaken() -> None:
    resumed = run_of(1, started=0, due=0, run_count=2)
    newer = run_of(2, started=5, due=5)
    assert judge_turn(resumed, [resumed, newer], DEFAULTS) == "go"


def state(kind: str, seconds: float, name: str | None = None) -> State:
    when = NOW + timedelta(seconds=seconds)
    return State(type=StateType[kind], name=name, timestamp=when)


def test_an_attempt_begins_anew_when_it_was_due_again_and_not_when_it_goes_on() -> None:
    due, first, died = state("SCHEDULED", -1), state("RUNNING", 0), state("CRASHED", 1)
    assert began([died, first, due, state("RUNNING", 2)]) == NOW  # a false report
    again = state("SCHEDULED", 2, "AwaitingRetry")
    assert began([due, first, died, again, state("PENDING", 3)]) is None
    assert began([due, first, died, again, state("RUNNING", 4)]) == NOW + timedelta(seconds=4)


def test_a_run_that_was_given_up_or_failed_is_repeated_with_a_clean_slate() -> None:
    first, repeated = state("RUNNING", 0), state("RUNNING", 4)
    assert since_end([first, state("CRASHED", 1, GIVEN_UP), repeated]) == [repeated]
    assert since_end([first, state("FAILED", 1), repeated]) == [repeated]
    died = state("CRASHED", 1)
    assert since_end([repeated, died, first]) == [first, died, repeated]


def test_a_flow_takes_its_turn_with_its_own_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with what this run was given: other runs left out the default, not that."""
    seen = list[dict[str, object]]()
    monkeypatch.setattr("tasks.runs.turn.take_turn", seen.append)
    monkeypatch.setattr("tasks.runs.turn.attempt", nullcontext)

    @in_turn
    def flow(dataset: str = "mnist", store: str = "s3://a") -> State[object]:
        return Completed(message=dataset)

    assert flow("letters", store="s3://b").message == "letters"
    assert seen == [DEFAULTS]
