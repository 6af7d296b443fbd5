"""Records of every format that was ever stored: they load for ever, and are written as they were.

`KIND-FORMAT.json` holds one, byte for byte as a release wrote it; 0 is older than numbers.
A file is never changed: a new format comes with a new file.
"""

import hashlib
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from expectations.image_table import image_table
from expectations.reference import ReferenceProfile
from mnist_cnn.digits import Digits
from mnist_cnn.evaluation import Evaluation, Outcomes
from mnist_cnn.promotion import Decision
from mnist_cnn.record import Record
from tasks.datasets.ledger import _Base
from tasks.datasets.snapshots import _manifest, _snapshot, read_snapshot
from tasks.decide import _Decided, score
from tasks.evaluate import _packed
from tasks.promote import Rollback
from tasks.records import BatchVerdict, Intake, RejectedSnapshot, RunSummary, ValidatedSnapshot
from tasks.registry.fingerprint import Fingerprint
from tasks.registry.history import CarriedOut, Move, check_history
from tasks.runs.outcome import Outcome
from tasks.watch.delivery import Delivery
from tasks.watch.histories import Checks
from tasks.watch.notifications import LastLook

GOLDEN = Path(__file__).parent
SNAPSHOT = "c0c1ea445f64edaa912cd3b0389b884dc4fc16e81503fe2647a64383b9aebd66"
BASE = "e831fb5550915598e2f382ebda2080b3300060bf6b57ede31e61d09843f8748d"
MOVES = (
    "93d4a5eefc490fe3ce3e53e279cb7f16b38c1258a790b8e9b4eb6aab9093d555",
    "63aa6016da6f8df9981597b6481332faa4669dd8df91c70997a12c786127c58e",
)
ARRIVED = datetime(2026, 11, 2, 6, 12, 40, tzinfo=UTC)

# The class of each kind, and facts of its golden records.
KINDS: dict[str, tuple[type[Record], Callable[..., bool]]] = {
    "base": (_Base, lambda it: it.snapshot == BASE),
    "carried-out": (CarriedOut, lambda it: it.move == MOVES[0]),
    "decision": (
        Decision,
        lambda it: (
            (it.verdict, it.champion, it.decisions) == ("promote", "models:/mnist-cnn/1", 3)
            and (it.checks[1].observed, it.checks[2].kind) == (None, "benefit")
            and it.comparisons[0].losses == 9
        ),
    ),
    "delivery": (
        Delivery,
        lambda it: (
            it.message.key == "promoted-mnist-cnn-2"
            and it.tries[it.owed[0]].refused == 3
            and it.given_up == {"custom-webhook/retraining-old": "it answered 410"}
        ),
    ),
    "evaluation": (
        Evaluation,
        lambda it: (
            (it.model, it.accuracy, it.images) == ("models:/mnist-cnn/2", 0.9956, 10_000)
            and it.conditions[1].gap == "the corruption failed with MemoryError()"
            and (it.priors.worst.accuracy, it.times.single_image_ms) == (0.9951, 0.163)
        ),
    ),
    "fingerprint": (Fingerprint, lambda it: (it.snapshot, it.code) == (SNAPSHOT, "a1" * 32)),
    "histories-verified": (Checks, lambda it: it.models["digits-cnn"].unread_since == ARRIVED),
    "intake": (
        Intake,
        lambda it: (
            it.validated.snapshot.digest == SNAPSHOT
            and [verdict.accepted for verdict in it.verdicts] == [True, False]
        ),
    ),
    "last-look": (LastLook, lambda it: it.looked == ARRIVED),
    "move": (Move, lambda it: it.digest == MOVES[it.sequence - 1]),
    "outcome": (Outcome, lambda it: it.state.is_completed() and it.state.name == "Promoted"),
    "profile": (ReferenceProfile, lambda it: it.images == 30),
    "rejected": (RejectedSnapshot, lambda it: it.failures == ["labels are outside 0-9: 12 images"]),
    "rollback": (Rollback, lambda it: (it.target.version, it.replaces.version) == ("1", "2")),
    "summary": (
        RunSummary,
        lambda it: (
            (it.verdict, it.dataset, it.accuracy) == ("Promoted", "mnist", 0.9956)
            and it.message == "superior overall, and no loss beyond a margin"
        ),
    ),
    "validated": (
        ValidatedSnapshot,
        lambda it: (it.snapshot.until, it.expectations) == (ARRIVED, 61),
    ),
    "verdict": (
        BatchVerdict,
        lambda it: (
            (it.sequence, it.batch, it.accepted, it.arrived) == (7, "monday", True, ARRIVED)
            and (it.files[0].bytes, it.shards[0].images, it.repeated) == (18211, 3, 1)
        ),
    ),
}
FILES = sorted(path.stem for path in GOLDEN.glob("*.json") if path.stem != "snapshot-0")


def golden(name: str) -> bytes:
    return (GOLDEN / f"{name}.json").read_bytes()


def store_of(content: bytes) -> Any:
    """Return a store with that content under every name."""
    return SimpleNamespace(address="s3://retraining", name_of=str, get=lambda _: content)


def made(images: int, factor: int) -> Digits:
    """Return the images of a golden shard."""
    pixels = (np.arange(images * 28 * 28) * factor % 251).astype(np.uint8)
    return Digits(pixels.reshape(images, 28, 28), np.arange(images) % 10)


@pytest.mark.parametrize("name", FILES)
def test_a_record_has_what_was_written_and_is_written_as_it_was(name: str) -> None:
    stem, _, number = name.rpartition("-")
    kind, has_its_facts = KINDS[stem]
    content = golden(name)
    record = kind.model_validate_json(content)
    assert record.format == (int(number) or None)
    assert has_its_facts(record)
    # A field that was renamed or removed is missing here; one that is newer is not set.
    indent = 1 if b"\n" in content else None
    assert record.model_dump_json(exclude_unset=True, indent=indent).encode() == content


@pytest.mark.parametrize("stem", KINDS)
def test_the_newest_format_of_a_kind_is_golden_and_a_newer_one_is_refused(stem: str) -> None:
    kind, _ = KINDS[stem]
    newest = kind.model_fields["format"].default
    content = json.loads(golden(f"{stem}-{newest}")) | {"format": newest + 1}
    sentence = (
        rf"written by a newer release \(format {newest + 1}; this one reads {newest}\); upgrade "
        "this installation"
    )
    with pytest.raises(ValidationError, match=sentence):
        kind.model_validate_json(json.dumps(content))


def test_a_chain_of_moves_holds_across_formats() -> None:
    contents = [golden("move-0"), golden("move-1")]
    stored = {
        f"models/mnist-cnn/history/{sequence:06d}-{digest}.json": content
        for sequence, (digest, content) in enumerate(zip(MOVES, contents, strict=True), 1)
    }
    tagged = [("history.000001", contents[0].decode()), ("history.000002", contents[1].decode())]
    history = check_history(stored, tagged)
    assert not history.problems
    assert not history.lost
    # A lost object is restored from its tag, under its name and with its bytes.
    lost = check_history({}, tagged).lost
    assert {move.name: move.content.encode() for move in lost} == stored


def test_the_same_data_has_the_same_digest_in_every_release() -> None:
    content = golden("snapshot-0")
    store = store_of(content)
    snapshot = read_snapshot(store, "mnist", SNAPSHOT)
    assert (snapshot.parent, snapshot.until) == (BASE, ARRIVED)
    assert snapshot.train[1] == BatchVerdict.model_validate_json(golden("verdict-0")).shards[0]
    assert _manifest(snapshot) == content
    assert (
        _snapshot(store.address, "mnist", snapshot.train, snapshot.test, BASE, ARRIVED) == snapshot
    )
    assert _snapshot(store.address, "mnist", snapshot.train[:1], snapshot.test).digest == BASE


def test_a_manifest_of_a_newer_format_is_refused() -> None:
    content = json.dumps(json.loads(golden("snapshot-0")) | {"format": 2}).encode()
    with pytest.raises(ValidationError, match=r"newer release \(format 2; this one reads 0\)"):
        read_snapshot(store_of(content), "mnist", hashlib.sha256(content).hexdigest())


def test_shards_and_images_keep_their_digests() -> None:
    snapshot = read_snapshot(store_of(golden("snapshot-0")), "mnist", SNAPSHOT)
    shards = [made(30, 7), made(3, 13), made(20, 11)]
    assert [s.digest() for s in shards] == [s.digest for s in snapshot.train + snapshot.test]
    table = image_table(shards[1].images, shards[1].labels)
    assert table["digest"].tolist() == [
        -4457408450745252182,
        9031196586355047991,
        4712580245687970655,
    ]
    assert table["near_digest"].tolist() == [7227192505355723050] * 3


def test_equal_fingerprints_are_equal_across_formats() -> None:
    old, new = (Fingerprint.model_validate_json(golden(f"fingerprint-{n}")) for n in (0, 1))
    assert old.changes(new) == new.changes(old) == []


def test_an_earlier_decision_counts_whatever_became_of_its_other_fields() -> None:
    content = json.loads(golden("decision-0")) | {"verdict": "gone", "checks": {}, "level": None}
    decided = _Decided.model_validate_json(json.dumps(content))
    assert decided.candidate == "models:/m-3f0c5d9a1b7e4c2f8a6d0e1b2c3d4e5f"


def test_stored_outcomes_are_the_probabilities_and_one_array_for_each_condition() -> None:
    rng = np.random.default_rng(0)
    test = Digits(np.zeros((50, 28, 28), np.uint8), rng.integers(0, 10, 50))
    outcomes = Outcomes(
        rng.random((50, 10), np.float32), {"slant=-15": rng.integers(0, 10, 50, np.uint8)}
    )
    measured = Evaluation.model_validate_json(golden("evaluation-0"))
    scored = score(measured, store_of(_packed(outcomes)), test, test.digest(), None)
    assert (scored.right == (outcomes.probabilities.argmax(1) == test.labels)).all()
    assert list(scored.factors) == ["slant=-15"]
    assert (scored.factors["slant=-15"] == (outcomes.predictions["slant=-15"] == test.labels)).all()
