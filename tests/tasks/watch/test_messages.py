from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tasks.records import BatchVerdict, RunSummary
from tasks.runs.states import GIVEN_UP
from tasks.watch.messages import (
    EndedRun,
    IdleSchedule,
    Situation,
    Training,
    UnreadHistory,
    compose,
    key_of_batches,
    last_batches,
    shorten,
)

NOW = datetime(2026, 11, 23, 3, 30, tzinfo=UTC)
FORM = "https://prefect.example/deployments/deployment/7/run?parameters=%7B%7D"


def run(state: str, kind: str = "COMPLETED", *, age: float = 1, **given: Any) -> EndedRun:
    known = {
        "id": "b3c1",
        "name": "mnist-2026-11-23-0300",
        "flow": "train",
        "reason": "accuracy 0.9712 is below the floor 0.9900",
        "since": NOW - timedelta(minutes=age),
        "url": "https://prefect.example/runs/flow-run/b3c1",
        "dataset": "mnist",
    }
    return EndedRun(type=kind, state=state, **{**known, **given})


def subjects(*runs: EndedRun) -> list[str]:
    return [message.subject for message in compose(Situation(now=NOW, runs=runs))]


@pytest.mark.parametrize(
    ("state", "kind", "subject"),
    [
        ("Promoted", "COMPLETED", "Promoted: mnist-cnn"),
        ("Approved", "COMPLETED", "Approved: mnist-cnn"),
        ("Awaiting approval", "COMPLETED", "Awaiting approval: mnist-cnn"),
        ("Rolled back", "COMPLETED", "Rolled back: mnist-cnn"),
        ("Data rejected", "FAILED", "Data rejected: train of mnist"),
        ("A gate is open", "FAILED", "A gate is open: train of mnist"),
        ("History broken", "FAILED", "History broken: train of mnist"),
        ("Champion changed", "FAILED", "Champion changed: train of mnist"),
        ("Timed out", "FAILED", "Timed out: train of mnist"),
        ("Failed", "FAILED", "Failed: train of mnist"),
        ("Refused", "FAILED", "Refused: train of mnist"),
        (GIVEN_UP, "CRASHED", "Given up: train of mnist"),
    ],
)
def test_what_people_have_to_know_is_a_message(state: str, kind: str, subject: str) -> None:
    assert subjects(run(state, kind)) == [subject]


def test_a_run_that_a_person_repeated_and_that_failed_again_is_told_again() -> None:
    first, second = run("Failed", "FAILED"), run("Failed", "FAILED", attempt=2)
    assert len({message.key for message in compose(Situation(now=NOW, runs=(first, second)))}) == 2
    assert len(subjects(first, first)) == 1


@pytest.mark.parametrize(
    "state",
    [
        "Skipped",
        "Champion kept",
        "Overtaken",
        "Batches accepted",
        "Batches quarantined",  # the ledger tells which ones
        "No batch",
        "Rejected",
        "Gates hold",
        "History whole",
        "Nothing to remove",
        "Completed",
    ],
)
def test_what_went_as_it_should_is_quiet(state: str) -> None:
    assert subjects(run(state)) == []


def test_a_cancelled_run_is_its_persons_business() -> None:
    assert subjects(run("Cancelled", "CANCELLED")) == []


@pytest.mark.parametrize(("age", "told"), [(14.9, 0), (15.1, 1)])
def test_a_crashed_run_is_told_once_it_was_not_resumed_in_time(age: float, told: int) -> None:
    assert len(subjects(run("Crashed", "CRASHED", age=age))) == told


@pytest.mark.parametrize("kind", ["FAILED", "CRASHED"])
def test_a_watch_does_not_tell_of_watches(kind: str) -> None:
    assert subjects(run("Failed", kind, flow="watch", age=60)) == []


def test_a_run_that_fails_again_after_a_retry_is_the_same_fault() -> None:
    first = compose(Situation(now=NOW, runs=(run("Failed", "FAILED", reason="S3 is away"),)))
    again = compose(Situation(now=NOW, runs=(run(GIVEN_UP, "CRASHED", reason="killed"),)))
    assert first[0].key == again[0].key


def test_news_of_one_run_are_one_message_each() -> None:
    (failed,) = compose(Situation(now=NOW, runs=(run("Failed", "FAILED"),)))
    (promoted,) = compose(Situation(now=NOW, runs=(run("Promoted"),)))
    assert failed.key != promoted.key


def test_a_message_on_approval_carries_reason_version_and_the_links_of_the_summary() -> None:
    links = {
        "snapshot": "https://s3.example/snapshot",
        "MLflow run": "https://mlflow.example/#/experiments/1/runs/2",
        "approval form": FORM,
    }
    summary = RunSummary(
        flow_run="b3c1",
        verdict="Awaiting approval",
        reason="faster, not proved to be no worse",
        dataset="mnist",
        version="models:/mnist-cnn/5",
        links=links,
    )
    waiting = run("Awaiting approval", summary=summary)
    (message,) = compose(Situation(now=NOW, runs=(waiting,)))
    assert message.subject == "Awaiting approval: mnist-cnn version 5"
    assert message.body.splitlines() == [
        "faster, not proved to be no worse",
        f"approval form: {FORM}",
        "Prefect run: https://prefect.example/runs/flow-run/b3c1",
        "MLflow run: https://mlflow.example/#/experiments/1/runs/2",
    ]
    assert message.facts == {
        "kind": "awaiting-approval",
        "verdict": "Awaiting approval",
        "dataset": "mnist",
        "model": "mnist-cnn",
        "model_version": "5",
        "flow": "train",
        "run": "b3c1",
        "link_approval_form": FORM,
        "link_prefect_run": "https://prefect.example/runs/flow-run/b3c1",
        "link_mlflow_run": "https://mlflow.example/#/experiments/1/runs/2",
    }


def test_a_run_without_a_data_set_is_told_by_its_name() -> None:
    retain = run(
        "Failed", "FAILED", flow="retain", name="what s3://x no longer needs", dataset=None
    )
    (message,) = compose(Situation(now=NOW, runs=(retain,)))
    assert message.subject == "Failed: retain of what s3://x no longer needs"
    assert message.facts.keys().isdisjoint({"dataset", "model", "model_version"})


def test_no_message_is_too_long_for_discord() -> None:
    (message,) = compose(Situation(now=NOW, runs=(run("Failed", "FAILED", reason="x" * 5000),)))
    assert len(message.body) <= 1800
    assert message.body.endswith("b3c1")  # the reason is cut, the link is whole


def verdict(sequence: int, batch: str, dataset: str = "mnist") -> BatchVerdict:
    return BatchVerdict(
        sequence=sequence,
        dataset=dataset,
        batch=batch,
        accepted=False,
        reason="the labels do not belong to the images",
        digest="d" * 64,
        arrived=NOW,
        files=[],
        images=10,
    )


def test_batches_that_were_put_aside_together_are_one_message_for_each_data_set() -> None:
    refused = (verdict(8, "b"), verdict(7, "a"), verdict(1, "c", "digits"))
    mnist, digits = compose(Situation(now=NOW, refused=refused))
    assert mnist.subject == "Batches quarantined: 2 batches of mnist"
    assert mnist.body.splitlines() == [
        "'a': the labels do not belong to the images",
        "'b': the labels do not belong to the images",
    ]
    assert mnist.facts["batches"] == "a, b"
    assert digits.subject == "Batches quarantined: batch 'c' of digits"


def test_the_keys_of_messages_tell_which_batches_people_know() -> None:
    keys = [key_of_batches("mnist", 7), key_of_batches("mnist", 12), key_of_batches("my-set", 3)]
    assert last_batches([*keys, "b3c1-failed-1"]) == {"mnist": 12, "my-set": 3}


def training(**days: float | None) -> Training:
    dates = {name: None if n is None else NOW - timedelta(days=n) for name, n in days.items()}
    known: dict[str, Any] = {"since": NOW - timedelta(days=20), "attempted": None}
    return Training(**{"dataset": "mnist", "scheduled": True, "succeeded": None, **known, **dates})


@pytest.mark.parametrize(
    ("days", "scheduled", "told"),
    [
        ({"succeeded": 7.9}, True, 0),
        ({"succeeded": 8.1}, True, 1),
        ({"since": 7.9}, True, 0),  # the data set is new
        ({"since": 8.1}, True, 1),
        ({"succeeded": 9, "attempted": 1}, False, 1),
        ({"succeeded": 9, "attempted": 9}, False, 0),  # by hand, and nobody tries any more
        ({"since": 9, "attempted": 8.5}, False, 0),
    ],
)
def test_a_data_set_that_nobody_could_train_on_for_eight_days_is_a_fault(
    days: dict[str, float], told: int, *, scheduled: bool
) -> None:
    each = training(**days)
    each = Training(**{**vars(each), "scheduled": scheduled})
    assert len(compose(Situation(now=NOW, trainings=(each,)))) == told


def test_a_drought_is_told_again_after_eight_more_days_and_not_before() -> None:
    def key(day: float) -> str:
        now = NOW + timedelta(days=day)
        each = training(succeeded=9, attempted=2)
        (message,) = compose(Situation(now=now, trainings=(each,)))
        return message.key

    assert key(0) == key(6.9) != key(7.1)


def test_a_drought_says_since_when() -> None:
    (message,) = compose(Situation(now=NOW, trainings=(training(succeeded=9.5, attempted=2),)))
    assert message.subject == "Not trained for 9 days: mnist"
    assert "ended 2026-11-13 15:30 UTC" in message.body
    assert "began: 2026-11-21 03:30 UTC" in message.body


def test_a_drought_of_a_sparse_schedule_is_told_after_its_own_limit_and_once_for_each() -> None:
    def keys(day: float) -> list[str]:
        each = training(succeeded=31, attempted=31)
        each = Training(**{**vars(each), "limit": timedelta(days=32)})
        return [m.key for m in compose(Situation(now=NOW + timedelta(days=day), trainings=(each,)))]

    assert keys(0.9) == []
    assert len(keys(1.1)) == 1
    assert keys(1.1) == keys(32.9) != keys(33.1)


@pytest.mark.parametrize(("minutes", "told"), [(9, 0), (11, 1)])
def test_an_active_schedule_without_a_run_is_a_fault_unless_it_is_new(
    minutes: float, told: int
) -> None:
    changed = NOW - timedelta(minutes=minutes)
    idle = IdleSchedule("train/weekly", "weekly", changed, last=NOW - timedelta(days=7))
    messages = compose(Situation(now=NOW, idle=(idle,)))
    assert [message.subject for message in messages] == ["No run is due: train/weekly"] * told


def test_a_broken_history_is_one_fault_however_it_was_found() -> None:
    found = run("History broken", "FAILED", flow="promote", reason="move 2 is missing")
    by_hand = compose(Situation(now=NOW, runs=(found,)))
    daily = compose(Situation(now=NOW, broken={"mnist-cnn": "move 2 is missing"}))
    worse = compose(Situation(now=NOW, broken={"mnist-cnn": "moves 2 and 3 are missing"}))
    assert by_hand[0].key == daily[0].key != worse[0].key
    assert daily[0].subject == "History broken: mnist-cnn"


@pytest.mark.parametrize(("days", "told"), [(0.9, 0), (1.1, 1)])
def test_a_history_that_cannot_be_read_for_more_than_a_day_is_told(days: float, told: int) -> None:
    unread = UnreadHistory("mnist-cnn", NOW - timedelta(days=days), "MLflow does not answer")
    messages = compose(Situation(now=NOW, unread=(unread,)))
    assert [m.subject for m in messages] == ["History not verified for 1 day: mnist-cnn"] * told
    assert [m.body for m in messages] == ["MLflow does not answer"] * told


def test_histories_that_cannot_be_read_are_one_message_as_long_as_it_lasts() -> None:
    def key(day: int) -> str:
        unread = tuple(
            UnreadHistory(f"{name}-cnn", NOW - timedelta(days=2), "MLflow does not answer")
            for name in ("digits", "mnist")
        )
        (message,) = compose(Situation(now=NOW + timedelta(days=day), unread=unread))
        assert message.subject.endswith("digits-cnn, mnist-cnn")
        return message.key

    assert key(0) == key(5)


def test_the_short_form_is_the_subject_and_one_link() -> None:
    failed = run("Failed", "FAILED", reason="x" * 5000, dataset="d" * 300)
    (message,) = compose(Situation(now=NOW, runs=(failed,)))
    short = shorten(message)
    assert (short.key, short.severity) == (message.key, message.severity)
    assert short.body == "https://prefect.example/runs/flow-run/b3c1"
    assert len(short.subject) <= 140
    assert "link_prefect_run" not in short.facts


def test_the_short_form_of_a_message_without_a_link_is_the_beginning_of_its_text() -> None:
    (message,) = compose(Situation(now=NOW, broken={"mnist-cnn": "move 2 is missing " * 100}))
    assert len(shorten(message).body) <= 140


def test_nothing_happened_and_nothing_is_wrong() -> None:
    assert compose(Situation(now=NOW)) == []
