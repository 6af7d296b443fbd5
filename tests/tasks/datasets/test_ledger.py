"""The ledger and the present snapshot, whose cost does not grow with the batches of years."""

from collections import Counter
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from prefect.logging import disable_run_logger

from expectations.image_table import image_table
from mnist_cnn.digits import Digits
from mnist_cnn.sample import embedded_sample
from tasks import keys
from tasks.arrivals.batch_files import write_parquet
from tasks.datasets import ledger, snapshots
from tasks.datasets.ledger import present_snapshot, read_base, read_ledger, settle, write_verdict
from tasks.datasets.snapshots import extend_snapshot, write_shards, write_snapshot
from tasks.ingest import ingest_batch
from tasks.records import BatchVerdict, Snapshot
from tasks.services.s3 import Store
from tests.tasks.memory import MemoryS3

TRAIN, TEST = embedded_sample()
DAY = datetime(2026, 11, 2, tzinfo=UTC)


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> MemoryS3:
    return MemoryS3(monkeypatch)


@pytest.fixture
def store(s3: MemoryS3) -> Store:
    return Store("s3://bucket")


@pytest.fixture
def base(store: Store, monkeypatch: pytest.MonkeyPatch) -> Snapshot:
    """Return a data set that has begun, in a process that has read nothing of it."""
    forget(monkeypatch)
    snapshot = write_snapshot(store, "digits", TRAIN, TEST, "a test")
    ledger.write_base(store, snapshot)
    return snapshot


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Go on as if in another process."""
    monkeypatch.setattr(ledger, "_ENTRIES", {})
    monkeypatch.setattr(ledger, "_PRESENT", {})
    monkeypatch.setattr(snapshots, "_DIGESTS", {})


def accept(store: Store, sequence: int, *, accepted: bool = True) -> BatchVerdict:
    """Put a judged batch on record, without a manifest for it, as a run that dies leaves it."""
    digits = Digits(np.full((5, 28, 28), sequence, np.uint8), TRAIN.labels[:5])
    table = image_table(digits.images, digits.labels)
    batch = f"day-{sequence}"
    verdict = BatchVerdict(
        sequence=sequence,
        dataset="digits",
        batch=batch,
        accepted=accepted,
        reason="a test",
        digest=digits.digest(),
        arrived=DAY - timedelta(days=sequence % 2),  # not in the order of the ledger
        files=[],
        images=len(digits),
        shards=write_shards(store, "digits", digits, table, f"batch {batch}") if accepted else [],
    )
    write_verdict(store, verdict)
    settle(store, verdict)
    return verdict


def test_the_present_snapshot_is_that_of_one_extension_after_the_other(
    store: Store, base: Snapshot, s3: MemoryS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdicts = [accept(store, number, accepted=number != 3) for number in range(1, 6)]
    before = dict(s3.objects)
    expected = base
    for verdict in verdicts:
        if verdict.accepted:
            expected = extend_snapshot(store, expected, verdict.shards, verdict.arrived)
    written = dict(s3.objects)
    assert present_snapshot(store, base, read_ledger(store, "digits")) == expected
    # Whatever manifests a run that died has left missing are written, with the same bytes.
    s3.objects = before
    forget(monkeypatch)
    assert present_snapshot(store, base, read_ledger(store, "digits")) == expected
    assert s3.objects == written
    s3.objects.pop(keys.manifest("digits", expected.digest))
    s3.objects.pop(keys.profile("digits", expected.digest))
    forget(monkeypatch)
    assert present_snapshot(store, base, read_ledger(store, "digits")) == expected
    assert s3.objects == written


def test_a_ledger_that_another_run_has_extended_is_read_to_its_end(
    store: Store, base: Snapshot
) -> None:
    accept(store, 1)
    first = present_snapshot(store, base, read_ledger(store, "digits"))
    accept(store, 2)
    verdicts = read_ledger(store, "digits")
    assert [verdict.batch for verdict in verdicts] == ["day-1", "day-2"]
    assert present_snapshot(store, base, verdicts).parent == first.digest
    # An older ledger has an older snapshot, whatever this process has seen.
    assert present_snapshot(store, base, verdicts[:1]) == first
    assert present_snapshot(store, base, []) == base


def ingest(store: Store, s3: MemoryS3, start: int) -> Counter[str]:
    """Let honest images arrive and be judged; return the requests, by operation and folder."""
    part = TRAIN.part(start, start + 400)
    batch = f"from-{start}"
    moved = Digits(np.roll(part.images, 1, axis=2), part.labels)  # so that they are new
    files = {"part.parquet": write_parquet(moved), "_SUCCESS": b""}
    for name, content in files.items():
        store.put(keys.incoming("digits", batch, name), content)
    snapshot = read_base(store, "digits")
    assert snapshot
    s3.requests.clear()
    with disable_run_logger():
        verdict = ingest_batch.fn(snapshot, batch, None)
    assert verdict
    assert verdict.accepted, verdict.reason
    return Counter("/".join(request.split("/")[:3]) for request in s3.requests)


@pytest.mark.slow
def test_an_ingest_reads_each_earlier_batch_once_and_writes_for_its_own_alone(
    store: Store, base: Snapshot, s3: MemoryS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.ingest.exclusive", lambda *_: nullcontext())
    monkeypatch.setattr("tasks.ingest.emit", lambda *_: None)
    alone = ingest(store, s3, 0)
    for number in range(2, 42):
        accept(store, number)
    present_snapshot(store, base, read_ledger(store, "digits"))
    forget(monkeypatch)
    among_many = ingest(store, s3, 400)
    # In a new process: one request for the verdict of each earlier batch, one for its digests.
    assert among_many - alone == {
        "GetObject datasets/digits/ledger": 41,
        "GetObject datasets/digits/shards": 41,
        "HeadObject datasets/digits/snapshots": 1,
        "ListObjectsV2 datasets/digits/ledger": 1,
    }
    # In the same process: for the batch before it, which was written without being read.
    next_one = ingest(store, s3, 800)
    assert (next_one - alone).total() <= 3
