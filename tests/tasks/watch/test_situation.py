"""How long a data set may be without a training, and when it was last trained on."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest
from prefect.client.schemas.objects import DeploymentSchedule, FlowRun, State
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
from prefect.states import Completed, Failed

from tasks.runs.turn import OVERTAKEN
from tasks.watch.messages import DROUGHT, Situation, compose
from tasks.watch.situation import Due, describe_trainings, longest_gap, take_trainings

NOW = datetime(2026, 11, 23, 3, 30, tzinfo=UTC)
RECENT = NOW - timedelta(days=30)


def cron(text: str) -> DeploymentSchedule:
    rule = CronSchedule(cron=text, timezone="UTC")
    return DeploymentSchedule(id=uuid4(), schedule=rule, active=True)


@pytest.mark.parametrize(
    ("text", "days"),
    [
        ("0 3 * * 1", 7),
        ("0 12 1 * *", 31),
        ("0 3 1 1 *", 365),
        ("*/5 9-17 1-7 * *", 24),  # to within a day: the first week of a month, every five minutes
        ("*/5 * * * *", 0),
    ],
)
def test_the_longest_gap_of_a_schedule_is_found_however_dense_it_is(text: str, days: int) -> None:
    assert abs(longest_gap(cron(text), NOW) - timedelta(days=days)) <= timedelta(days=1)


def test_a_schedule_by_interval_has_a_gap_as_well() -> None:
    rule = IntervalSchedule(interval=timedelta(days=14), anchor_date=NOW)
    schedule = DeploymentSchedule(id=uuid4(), schedule=rule, active=True)
    assert abs(longest_gap(schedule, NOW) - timedelta(days=14)) < timedelta(seconds=1)


def run(days_ago: float, state: State, dataset: str = "mnist") -> FlowRun:
    began = NOW - timedelta(days=days_ago)
    return FlowRun(
        flow_id=UUID(int=1),
        parameters={"dataset": dataset},
        state=state,
        expected_start_time=began,
        start_time=began,
        end_time=began + timedelta(minutes=3),
    )


def due(limit: timedelta = DROUGHT) -> dict[str, Due]:
    return {"mnist": Due(since=NOW - timedelta(days=400), limit=limit)}


def drought(runs: list[FlowRun], limit: timedelta = DROUGHT) -> list[tuple[str, str, str]]:
    taken = take_trainings(runs, {}, due(limit), since=RECENT)
    trainings = tuple(describe_trainings(taken, {}, due(limit)))
    messages = compose(Situation(now=NOW, trainings=trainings))
    return [(message.subject, message.key, message.body) for message in messages]


def test_a_monthly_data_set_lacks_no_training_after_three_weeks() -> None:
    runs = [run(22, Completed(name="Promoted"))]
    assert len(drought(runs)) == 1
    assert drought(runs, timedelta(days=32)) == []


def test_the_last_training_that_went_well_is_told_however_long_ago_it_was() -> None:
    failures = [run(7 * week, Failed()) for week in range(6)]
    ((subject, key, body),) = drought([*failures, run(43, Completed(name="Champion kept"))])
    assert subject == "Not trained for 42 days: mnist"
    assert "ended 2026-10-11 03:33 UTC" in body
    later = [run(7 * week, Failed()) for week in range(5)]
    assert drought([*later, run(43, Completed(name="Champion kept"))])[0][1] == key


def test_an_overtaken_run_is_no_training() -> None:
    ((_, _, body),) = drought([run(1, Completed(name=OVERTAKEN)), run(60, Completed())])
    assert "ended 2026-09-24" in body


def test_runs_are_read_no_further_than_to_the_last_training_that_went_well() -> None:
    def newest_first() -> Iterator[FlowRun]:
        yield run(1, Failed())
        yield run(40, Completed(name="Promoted"))
        yield run(41, Failed(), dataset="digits")  # nobody asks about it: no schedule, no run since
        raise AssertionError("older runs were read")

    taken = take_trainings(newest_first(), {}, due(), since=RECENT)
    assert [each.expected_start_time for each in taken] == [
        NOW - timedelta(days=1),
        NOW - timedelta(days=40),
    ]
