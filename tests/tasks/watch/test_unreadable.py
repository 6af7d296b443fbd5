"""An object that cannot be read, or a run with a bad store, keeps no message of others back."""

import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tasks import keys
from tasks.services.s3 import StorageRefused, Store
from tasks.watch.histories import Checks, _read_checks
from tasks.watch.messages import EndedRun
from tasks.watch.notifications import Outbox, read_last_look
from tasks.watch.situation import Subject, _read_refused, _with_summary
from tests.tasks.memory import MemoryS3

STORE = "s3://bucket"
NOW = datetime(2026, 11, 2, tzinfo=UTC)
GOLDEN = Path(__file__).parents[2] / "golden"
NEWER = b'{"format": 99}'


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> MemoryS3:
    for module in ("notifications", "situation"):
        monkeypatch.setattr(f"tasks.watch.{module}.get_run_logger", logging.getLogger)
    return MemoryS3(monkeypatch)


def ended() -> EndedRun:
    return EndedRun(
        id="6f1b3c52-7c1e-4a0e-9d0a-2f6f0d9c7a11",
        name="train",
        flow="train",
        type="FAILED",
        state="Failed",
        reason="no reason",
        since=NOW,
        url="",
        dataset="mnist",
        attempt=1,
    )


@pytest.mark.parametrize("store", ["s3://my bucket", "s3://bucket?x", "s3://Bucket_ä"])
def test_a_store_of_which_no_request_can_be_made_is_refused(store: str) -> None:
    with pytest.raises(StorageRefused, match=r"no request can be made of s3://.*correct the addr"):
        Store(store).get("runs/summary.json")
    assert _with_summary(ended(), store) == ended()


def test_a_summary_of_another_release_is_left_out(s3: MemoryS3) -> None:
    s3.objects[keys.record(ended().id, "summary")] = NEWER
    assert _with_summary(ended(), STORE) == ended()


def test_foreign_messages_are_passed_over_and_the_others_retried(s3: MemoryS3) -> None:
    s3.objects[keys.message("a-foreign-one")] = b"not ours"
    s3.objects[keys.message("b-newer")] = NEWER
    s3.objects[keys.message("c-ours")] = (GOLDEN / "delivery-1.json").read_bytes()
    outbox = Outbox([], Store(STORE), NOW)
    outbox.retry(NOW - timedelta(days=1))
    assert f"GetObject {keys.message('c-ours')}" in s3.requests


def test_unreadable_notes_of_earlier_passes_are_as_none(s3: MemoryS3) -> None:
    s3.objects[keys.LAST_LOOK] = s3.objects[keys.HISTORIES_VERIFIED] = NEWER
    assert read_last_look(Store(STORE)) is None
    assert _read_checks(Store(STORE)) == Checks()


def test_an_unreadable_verdict_hides_no_other(s3: MemoryS3) -> None:
    ours = (
        (GOLDEN / "verdict-1.json").read_bytes().replace(b'"accepted": true', b'"accepted": false')
    )
    s3.objects[keys.verdict("mnist", 1, "a")] = NEWER
    s3.objects[keys.verdict("mnist", 2, "b")] = ours
    found = list(_read_refused({Subject("mnist", STORE)}, STORE, NOW - timedelta(days=999), {}))
    assert [verdict.batch for verdict in found] == ["monday"]
