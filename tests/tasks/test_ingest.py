"""What arrives is accepted once or put aside, on a real S3 server, whatever dies in between."""

import gzip
import subprocess
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from prefect.logging import disable_run_logger
from torch import nn

from deployments.stack import PROJECT
from mnist_cnn.digits import Digits
from mnist_cnn.idx import write_idx
from mnist_cnn.sample import embedded_sample
from tasks.arrivals.batch_files import write_parquet
from tasks.datasets.ledger import folder_of, present_snapshot, read_ledger, write_base
from tasks.datasets.snapshots import read_split, write_snapshot
from tasks.ingest import Arrivals, find_arrivals, ingest_batch
from tasks.records import BatchVerdict, ModelVersion, Snapshot
from tasks.services.s3 import Store

SAMPLE, HOLDOUT = embedded_sample()
Files = dict[str, bytes]


@pytest.fixture(autouse=True)
def _outside_of_a_run() -> Iterator[None]:
    with disable_run_logger():
        yield


@pytest.fixture
def base(store: Store) -> Snapshot:
    """Return a data set that has begun: the embedded sample."""
    snapshot = write_snapshot(store, "digits", SAMPLE, HOLDOUT, "a test")
    write_base(store, snapshot)
    return snapshot


def moved(digits: Digits, columns: int = 1) -> Digits:
    """Return the same handwriting a little further right: honest images that are new."""
    return Digits(np.roll(digits.images, columns, axis=2), digits.labels)


NEW = moved(SAMPLE.part(0, 400))


def idx(digits: Digits) -> Files:
    return {
        "a-images-idx3-ubyte.gz": gzip.compress(write_idx(digits.images), 1, mtime=0),
        "a-labels-idx1-ubyte.gz": gzip.compress(
            write_idx(digits.labels.astype(np.uint8)), 1, mtime=0
        ),
    }


def drop(store: Store, batch: str, files: Files, *, marked: bool = True) -> None:
    for name, content in {**files, **({"_SUCCESS": b""} if marked else {})}.items():
        store.put(f"datasets/digits/incoming/{batch}/{name}", content)


def find(base: Snapshot, quiet_minutes: float = 10) -> Arrivals:
    return find_arrivals.fn(base, quiet_minutes)


def take(base: Snapshot, batch: str) -> BatchVerdict:
    verdict = ingest_batch.fn(base, batch, None)
    assert verdict
    return verdict


def present(base: Snapshot) -> Snapshot:
    store = Store(base.store)
    return present_snapshot(store, base, read_ledger(store, base.dataset))


def under(store: Store, folder: str) -> list[str]:
    prefix = f"datasets/digits/{folder}/"
    return [name.removeprefix(prefix) for name in store.names(prefix)]


@pytest.mark.parametrize("files", [idx(NEW), {"part-0.parquet": write_parquet(NEW)}])
def test_a_good_batch_becomes_part_of_the_data_set(
    store: Store, base: Snapshot, files: Files
) -> None:
    drop(store, "monday", files)
    assert find(base) == Arrivals(complete=["monday"], waiting=[])
    verdict = take(base, "monday")
    assert verdict.accepted, verdict.reason
    assert (verdict.images, verdict.repeated) == (400, 0)
    grown = present(base)
    assert grown.parent == base.digest
    assert grown.until == verdict.arrived
    assert grown.train[-1].origin == "batch monday"
    together = read_split(grown, "train")
    assert np.array_equal(together.images[-400:], NEW.images)
    assert np.array_equal(together.labels[-400:], NEW.labels)
    assert read_split(grown, "test").digest() == HOLDOUT.digest()


def test_the_files_of_an_accepted_batch_are_kept_as_they_came(store: Store, base: Snapshot) -> None:
    files = idx(NEW)
    drop(store, "monday", files)
    take(base, "monday")
    assert under(store, "incoming") == []
    kept = under(store, "accepted")
    folder = "000001-monday/"
    came = [f"{folder}files/{name}" for name in [*files, "_SUCCESS"]]
    assert sorted(kept) == sorted([*came, f"{folder}report.html"])
    for name, content in files.items():
        assert store.get(f"datasets/digits/accepted/{folder}files/{name}") == content


def test_a_bad_batch_is_put_aside_whole_with_its_reason_and_report(
    store: Store, base: Snapshot
) -> None:
    files = idx(Digits(255 - NEW.images, NEW.labels))
    drop(store, "inverted", files)
    verdict = take(base, "inverted")
    assert not verdict.accepted
    assert "centre_over_border" in verdict.reason
    assert present(base) == base
    assert under(store, "incoming") == []
    folder = "datasets/digits/quarantine/000001-inverted/"
    assert BatchVerdict.model_validate_json(store.get(f"{folder}reason.json")) == verdict
    assert b"<html" in store.get(f"{folder}report.html")
    for name, content in files.items():
        assert store.get(f"{folder}files/{name}") == content


def test_a_bad_batch_does_not_stop_the_good_ones(store: Store, base: Snapshot) -> None:
    drop(store, "a-bad", {"a-images-idx3-ubyte": b"nothing", "a-labels-idx1-ubyte": b"nothing"})
    drop(store, "b-good", idx(NEW))
    verdicts = [take(base, name) for name in find(base).complete]
    assert [verdict.accepted for verdict in verdicts] == [False, True]
    assert present(base).images("train") == len(SAMPLE) + 400


def test_a_batch_that_is_still_uploaded_waits(store: Store, base: Snapshot) -> None:
    drop(store, "slow", idx(NEW), marked=False)
    assert find(base) == Arrivals(complete=[], waiting=["slow"])
    assert find(base, quiet_minutes=0) == Arrivals(complete=["slow"], waiting=[])
    assert under(store, "incoming") != []


def test_images_that_are_known_are_left_out_once_more(store: Store, base: Snapshot) -> None:
    """Fewer than the one per cent for which the whole batch is refused."""
    images, labels = NEW.images.copy(), NEW.labels.copy()
    images[7], labels[7] = SAMPLE.images[3], SAMPLE.labels[3]
    images[9], labels[9] = images[8], labels[8]
    drop(store, "monday", idx(Digits(images, labels)))
    verdict = take(base, "monday")
    assert verdict.accepted
    assert verdict.repeated == 2
    assert "were accepted before" in verdict.reason or "in_accepted" in verdict.reason
    assert present(base).images("train") == len(SAMPLE) + 398


def test_the_same_batch_twice_is_taken_once(store: Store, base: Snapshot) -> None:
    for name in ("monday", "monday", "tuesday"):
        drop(store, name, idx(NEW))
        verdict = take(base, name)
        assert verdict.accepted == (verdict.sequence == 1)
    assert "the same files were accepted as batch 'monday'" in verdict.reason
    assert present(base).images("train") == len(SAMPLE) + 400


def test_a_name_that_was_used_is_refused(store: Store, base: Snapshot) -> None:
    drop(store, "monday", idx(NEW))
    take(base, "monday")
    drop(store, "monday", idx(moved(SAMPLE.part(400, 800))))
    verdict = take(base, "monday")
    assert "another batch of the name 'monday' was accepted" in verdict.reason
    assert len(under(store, "quarantine")) == 4


def test_a_batch_that_was_put_aside_may_be_sent_again(store: Store, base: Snapshot) -> None:
    drop(
        store, "monday", {"a-images-idx3-ubyte.gz": b"\x1f\x8b", "a-labels-idx1-ubyte.gz": b"\x1f"}
    )
    assert not take(base, "monday").accepted
    drop(store, "monday", idx(NEW))
    assert take(base, "monday").accepted


def turned(digits: Digits) -> Digits:
    return Digits(np.rot90(digits.images, 1, (1, 2)).copy(), digits.labels)


def shuffled(digits: Digits, share: float = 0.3) -> Digits:
    rng, labels = np.random.default_rng(0), digits.labels.copy()
    chosen = rng.permutation(len(labels))[: int(share * len(labels))]
    labels[chosen] = rng.permutation(labels[chosen])
    return Digits(digits.images, labels)


def noise(digits: Digits) -> Digits:
    pixels = np.random.default_rng(0).integers(0, 256, digits.images.shape, np.uint8)
    return Digits(pixels, digits.labels)


def one_class(digits: Digits) -> Digits:
    many = moved(SAMPLE, 2)
    chosen = many.labels == 3
    return Digits(many.images[chosen], many.labels[chosen])


def with_holdout(digits: Digits) -> Digits:
    images, labels = digits.images.copy(), digits.labels.copy()
    images[:3], labels[:3] = HOLDOUT.images[:3], HOLDOUT.labels[:3]
    return Digits(images, labels)


def repeated(digits: Digits) -> Digits:
    images, labels = digits.images.copy(), digits.labels.copy()
    images[:40], labels[:40] = SAMPLE.images[:40], SAMPLE.labels[:40]
    return Digits(images, labels)


# Each kind of bad data, and the column of the expectation that catches it.
BAD_DATA: dict[str, tuple[Callable[[Digits], Digits], str]] = {
    "inverted": (lambda d: Digits(255 - d.images, d.labels), "centre_over_border"),
    "from 0 to 1": (lambda d: Digits(d.images // 255, d.labels), "maximum"),
    "shifted by 60": (lambda d: Digits(np.maximum(d.images, 60), d.labels), "minimum"),
    "rotated by 90 degrees": (turned, "upright_over_rotated_270"),
    "mirrored": (lambda d: Digits(d.images[:, :, ::-1].copy(), d.labels), "upright_over_mirrored"),
    "rows and columns swapped": (
        lambda d: Digits(d.images.transpose(0, 2, 1).copy(), d.labels),
        "upright_over_transposed",
    ),
    "labels shifted by one": (lambda d: Digits(d.images, (d.labels + 1) % 10), "label_match"),
    "noise only": (noise, "border"),
    "blank": (lambda d: Digits(np.zeros_like(d.images), d.labels), "blank"),
    "constant": (lambda d: Digits(np.full_like(d.images, 90), d.labels), "constant"),
    "one class only": (one_class, "label"),
    "one image": (lambda d: d.part(0, 1), "row_count"),
    "images of the holdout": (with_holdout, "in_holdout"),
    "a tenth is training data": (repeated, "in_accepted"),
    "the same image again and again": (
        lambda d: Digits(np.repeat(d.images[:40], 10, 0), np.repeat(d.labels[:40], 10)),
        "digest",
    ),
}


@pytest.mark.parametrize("kind", BAD_DATA)
def test_bad_data_never_reaches_a_snapshot(store: Store, base: Snapshot, kind: str) -> None:
    damage, column = BAD_DATA[kind]
    drop(store, "bad", idx(damage(NEW)))
    verdict = take(base, "bad")
    assert not verdict.accepted
    assert column in verdict.reason
    assert present(base) == base
    assert under(store, "incoming") == []


class NearestMean(nn.Module):
    """A champion that reads a digit by its distance from the mean of each class."""

    def __init__(self) -> None:
        super().__init__()
        images = torch.tensor(moved(SAMPLE).images, dtype=torch.float32).flatten(1)
        labels = torch.tensor(SAMPLE.labels)
        self.means = nn.Parameter(torch.stack([images[labels == d].mean(0) for d in range(10)]))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return -torch.cdist(images.flatten(1).float(), self.means) / 80


@pytest.mark.parametrize(("damage", "accepted"), [(shuffled, False), (lambda d: d, True)])
def test_labels_that_the_champion_contradicts_are_refused(
    store: Store,
    base: Snapshot,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Digits], Digits],
    *,
    accepted: bool,
) -> None:
    champion = ModelVersion(
        name="digits-cnn", version="1", run_id="r", model="models:/digits-cnn/1", snapshot="s"
    )
    monkeypatch.setattr("tasks.ingest.load_model", lambda _: (NearestMean(), 1))
    drop(store, "monday", idx(damage(NEW)))
    verdict = ingest_batch.fn(base, "monday", champion)
    assert verdict
    assert verdict.accepted == accepted, verdict.reason
    if not accepted:
        assert "champion_contradicts" in verdict.reason
        report = Store(base.store).get(f"{folder_of(verdict)}report.html").decode()
        assert "the champion says" in report


# Each kind of unreadable batch, and what the reason says; tests/tasks/test_batch_files.py has more.
PAIR = idx(NEW)
LABELS, IMAGES = "a-labels-idx1-ubyte.gz", "a-images-idx3-ubyte.gz"
UNREADABLE: dict[str, tuple[Files, str]] = {
    "only the marker": ({}, "has no file"),
    "labels alone": ({LABELS: PAIR[LABELS]}, "expected one pair"),
    "a file called as our own are": ({"reason.json": b"{}", "report.html": b""}, "not opened"),
    "a pickle": ({"images.pkl": b"cos\nsystem\n"}, "it was not opened"),
    "a folder in the batch": ({f"more/{name}": PAIR[name] for name in PAIR}, "no folders"),
    "a truncated gzip": (PAIR | {IMAGES: PAIR[IMAGES][:-100]}, "truncated"),
    "a name with odd characters": ({f"a b\u2028{n}": PAIR[n] for n in PAIR}, "no plain file name"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_cannot_be_read_is_put_aside_as_it_came(
    store: Store, base: Snapshot, kind: str
) -> None:
    files, sentence = UNREADABLE[kind]
    drop(store, "bad", files)
    verdict = take(base, "bad")
    assert sentence in verdict.reason
    assert verdict.report is None
    assert under(store, "incoming") == []
    assert len(under(store, "quarantine")) == len(files) + 2
    assert present(base) == base


def test_files_beside_the_folders_are_put_aside(store: Store, base: Snapshot) -> None:
    store.put("datasets/digits/incoming/loose.parquet", b"PAR1")
    drop(store, "monday", idx(NEW))
    arrivals = find(base, quiet_minutes=0)
    assert arrivals.complete == ["", "monday"]
    assert "directly under incoming/" in take(base, "").reason
    assert take(base, "monday").accepted
    assert under(store, "incoming") == []


@pytest.mark.parametrize("name", ["a b", "ünï", "per%cent", "-", "q'uote", "x" * 200])
def test_a_batch_may_have_any_name(store: Store, base: Snapshot, name: str) -> None:
    drop(store, name, {"nothing.txt": b"nothing"})
    assert find(base).complete == [name]
    assert not take(base, name).accepted
    assert under(store, "incoming") == []
    assert read_ledger(store, "digits")[0].batch == name


KILLED = """
import sys
from contextlib import suppress
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound
from prefect.logging import disable_run_logger
from tasks.ingest import find_arrivals, ingest_batch
from tasks.datasets.ledger import read_base
from tasks.services.s3 import Store
from tests.tasks.kill import kill_before_each_write
from expectations import suites, validation  # what a fork should not import again
import pandas, great_expectations, pyarrow.parquet

def ingest(place):
    with disable_run_logger():
        ingest_batch.fn(read_base(Store(place), "digits"), "monday", None)

writes = [(Store, "put"), (Store, "remove"), (Store, "copy")]
for _, code in kill_before_each_write(sys.argv[1:], writes, ingest):
    print(code, flush=True)
    # As the end of its lease does; a later end would free a slot that somebody else holds by then.
    with get_client(sync_client=True) as prefect, suppress(ObjectNotFound):
        prefect.delete_global_concurrency_limit_by_name("ingest-digits")
"""
WRITES = {
    # Digests, shard, report; the verdict; profile and manifest; copy and removal of each of three
    # files; the note that they have been moved.
    "good": 13,
    # Report, reason; the verdict; copies and removals; the note.
    "bad": 10,
}


@pytest.mark.parametrize("batch", WRITES)
def test_an_ingest_killed_at_any_write_loses_and_doubles_nothing(store: Store, batch: str) -> None:
    images = NEW.images if batch == "good" else 255 - NEW.images
    files = idx(Digits(images, NEW.labels))
    writes = WRITES[batch]
    places = [Store(f"{store.address}/{number}") for number in range(writes + 1)]
    bases = [write_snapshot(place, "digits", SAMPLE, HOLDOUT, "a test") for place in places]
    for place, base in zip(places, bases, strict=True):
        write_base(place, base)
        drop(place, "monday", files)
    command = [sys.executable, "-c", KILLED, *(place.address for place in places)]
    run = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert run.stdout.split() == ["-9"] * writes + ["0"], run.stderr
    for place, base in zip(places, bases, strict=True):
        for name in find(base).complete:
            take(base, name)
        (verdict,) = read_ledger(place, "digits")
        assert verdict.accepted == (batch == "good")
        grown = present(base)
        assert grown.images("train") == len(SAMPLE) + (400 if batch == "good" else 0)
        assert read_split(grown, "train").images[-1].sum() > 0
        assert under(place, "incoming") == []
        kept = under(place, "accepted") + under(place, "quarantine")
        assert len(kept) == 4 + (batch == "bad")
        for name, content in files.items():
            (whole,) = [each for each in kept if each.endswith(name)]
            folder = "accepted" if batch == "good" else "quarantine"
            assert "/files/" in whole
            assert place.get(f"datasets/digits/{folder}/{whole}") == content


def test_two_ingests_at_once_take_each_batch_once(store: Store, base: Snapshot) -> None:
    names = [f"day-{number}" for number in range(4)]
    for number, name in enumerate(names):
        drop(store, name, idx(moved(SAMPLE.part(300 * number, 300 * number + 300))))
    script = (
        "import sys\n"
        "from prefect.logging import disable_run_logger\n"
        "from tasks.ingest import ingest_batch\n"
        "from tasks.datasets.ledger import read_base\n"
        "from tasks.services.s3 import Store\n"
        "with disable_run_logger():\n"
        "    for name in sys.argv[2:]:\n"
        "        ingest_batch.fn(read_base(Store(sys.argv[1]), 'digits'), name, None)\n"
    )
    orders = [names, names[::-1]]
    racers = [
        subprocess.Popen([sys.executable, "-c", script, store.address, *order], cwd=PROJECT)
        for order in orders
    ]
    assert [racer.wait() for racer in racers] == [0, 0]
    ledger = read_ledger(store, "digits")
    assert sorted(verdict.batch for verdict in ledger) == names
    assert [verdict.sequence for verdict in ledger] == [1, 2, 3, 4]
    assert all(verdict.accepted for verdict in ledger)
    assert present(base).images("train") == len(SAMPLE) + 1200
