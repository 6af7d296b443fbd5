"""S3 browsers mark a folder by an empty object; none of ours is confused by one."""

from contextlib import nullcontext
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest
from prefect.states import Completed

from deployments.drop import drop
from mnist_cnn.sample import embedded_sample
from tasks import keys
from tasks.datasets.base import BASE_ARCHIVES, missing_archives
from tasks.datasets.ledger import present_snapshot, read_ledger, unsettled, write_base
from tasks.datasets.snapshots import read_split, write_snapshot
from tasks.ingest import find_arrivals
from tasks.registry.history import read_history
from tasks.retain import _ended
from tasks.services.s3 import Store
from tasks.sweep import find_waiting_datasets
from tests.tasks.memory import MemoryS3

STORE = "s3://bucket"
RUN = "6f1b3c52-7c1e-4a0e-9d0a-2f6f0d9c7a11"


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> MemoryS3:
    """Return a store with a marker for every folder of its layout."""
    memory = MemoryS3(monkeypatch)
    folders = [
        keys.archives("digits"),
        keys.incoming("digits"),
        keys.incoming("digits", "monday"),
        keys.ledger("digits"),
        keys.history("digits-cnn"),
        keys.carried_out("digits-cnn"),
        keys.checkpoints(RUN),
        keys.gate_check(RUN),
    ]
    for folder in folders:
        parts = folder.split("/")
        memory.objects |= {"/".join(parts[:depth]) + "/": b"" for depth in range(1, len(parts))}
    return memory


def test_none_is_listed(s3: MemoryS3) -> None:
    assert Store(STORE).entries("") == []
    assert "datasets/digits/incoming/" in s3.objects
    assert Store(STORE).folders(keys.DATASETS) == ["digits"]


def test_ledger_snapshots_and_archives_are_read_without_them(s3: MemoryS3) -> None:
    store, (train, test) = Store(STORE), embedded_sample()
    base = write_snapshot(store, "digits", train, test, "a test")
    write_base(store, base)
    ledger = read_ledger(store, "digits")
    assert ledger == unsettled(store, ledger) == []
    assert present_snapshot(store, base, ledger) == base
    assert read_split(base, "test").digest() == test.digest()
    assert missing_archives("digits", store) == list(BASE_ARCHIVES)


def test_none_is_a_batch(s3: MemoryS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.ingest.exclusive", lambda *_: nullcontext())
    monkeypatch.setenv("RETRAINING_STORE", STORE)
    base: Any = SimpleNamespace(store=STORE, dataset="digits")
    assert find_arrivals.fn(base, 0).complete == []
    assert find_waiting_datasets.fn(STORE) == []
    drop("digits", "monday", {"part.parquet": b"PAR1"})
    assert find_waiting_datasets.fn(STORE) == ["digits"]


def test_none_is_a_move(s3: MemoryS3) -> None:
    history = read_history(Store(STORE), "digits-cnn", [], restore=True)
    assert not history.moves
    assert not history.problems
    assert history.confirmed == frozenset()


def test_none_is_removed_with_what_a_run_left(
    s3: MemoryS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = SimpleNamespace(state=Completed(), end_time=datetime(2026, 11, 2, tzinfo=UTC))
    prefect = SimpleNamespace(read_flow_run=lambda _: run)
    monkeypatch.setattr("tasks.retain.get_client", lambda **_: nullcontext(prefect))
    store = Store(STORE)
    assert _ended(store) == {}
    store.put(keys.checkpoints(RUN, "1.pt"), b"weights")
    store.put(keys.record(RUN, "outcome"), b"{}")
    assert _ended(store) == {keys.checkpoints(RUN): run.end_time}
