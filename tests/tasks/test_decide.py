"""What the decision is told about the data that two models were trained on, through a real S3."""

import hashlib
import io
import json
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from prefect import flow
from prefect.client.schemas import State

from deployments.stack import Stack
from mnist_cnn.digits import Digits
from mnist_cnn.evaluation import Evaluation, Outcomes, evaluate
from mnist_cnn.promotion import Decision, PromotionPolicy
from mnist_cnn.sample import embedded_sample
from tasks.datasets.catalog import KNOWN
from tasks.datasets.snapshots import read_snapshot, write_snapshot
from tasks.decide import decide_promotion
from tasks.records import ModelVersion, Snapshot
from tasks.services.s3 import Store

PLACE = "s3://mnist-retraining/tests/decide"
POLICY = KNOWN["digits"].policy or PromotionPolicy()
MONDAY = datetime(2026, 11, 2, tzinfo=UTC)


def add_batch(base: Snapshot, until: datetime) -> Snapshot:
    """Write a manifest that says when the newest batch in it was accepted."""
    store = Store(base.store)
    manifest = json.loads(store.get(store.name_of(base.address)))
    content = json.dumps(manifest | {"parent": base.digest, "until": until.isoformat()}).encode()
    digest = hashlib.sha256(content).hexdigest()
    store.put(f"datasets/{base.dataset}/snapshots/{digest}.json", content)
    return read_snapshot(store, base.dataset, digest)


def measure(store: Store, test: Digits) -> Evaluation:
    """Return the evaluation of a model that is always right, with its outcomes in the store."""
    predictions = dict.fromkeys(POLICY.factor_floors, test.labels.astype(np.uint8))
    outcomes = Outcomes(np.eye(10, dtype=np.float32)[test.labels], predictions)
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, **outcomes.arrays())
    address = store.put("outcomes.npz", content.getvalue())
    return evaluate(outcomes, test, model="candidate", snapshot="", outcomes=address)


CASES = {
    "a batch, after the base": ("monday", "base"),
    "a later batch, after a batch": ("later", "monday"),
    "the base, after the base": ("base", "base"),
    "a batch, after the same": ("later", "later"),
    "a batch, after a later one": ("monday", "later"),
    "the base, after a batch": ("base", "monday"),
    "a champion without a manifest": ("later", "gone"),
    "a champion without a record": ("later", "not recorded"),
    "a champion of a changed manifest": ("later", "changed"),
}
"""What the candidate was trained on, and what the champion was."""


@flow
def decide_all(
    snapshots: dict[str, Snapshot], digests: dict[str, str], measured: Evaluation
) -> dict[str, State]:
    """Decide between equal models in every case."""
    states = {}
    for case, (ours, theirs) in CASES.items():
        version = ModelVersion(
            name="digits-cnn", version="1", run_id="run", model=case, snapshot=digests[theirs]
        )
        snapshot = snapshots[ours]
        candidate = measured.model_copy(update={"snapshot": snapshot.digest})
        champion = candidate.model_copy(update={"model": case}), version
        states[case] = decide_promotion(candidate, champion, snapshot, POLICY, return_state=True)
    return states


@pytest.fixture(scope="module")
def decided(stack: Stack) -> dict[str, State]:
    store, (train, test) = Store(PLACE), embedded_sample()
    base = write_snapshot(store, "digits", train, test, "the sample")
    assert read_snapshot(store, "digits", base.digest) == base
    snapshots = {
        "base": base,
        "monday": add_batch(base, MONDAY),
        "later": add_batch(base, MONDAY + timedelta(days=7)),
        "changed": add_batch(base, MONDAY - timedelta(days=7)),
    }
    name = store.name_of(snapshots["changed"].address)
    store.put(name, store.get(name).replace(b"2026-10-26", b"2026-10-27"))
    digests = {role: snapshot.digest for role, snapshot in snapshots.items()}
    digests |= {"gone": "f" * 64, "not recorded": "not recorded"}
    return decide_all(snapshots, digests, measure(store, test))


DATES = [
    ("a batch, after the base", True, "without any batch, candidate until 2026-11-02"),
    ("a later batch, after a batch", True, "until 2026-11-02 00:00:00+00:00, candidate until"),
    ("the base, after the base", False, "both were trained on the base data set alone"),
    ("a batch, after the same", False, "was not trained on older data: until 2026-11-09"),
    ("a batch, after a later one", False, "was not trained on older data: until 2026-11-09"),
    ("the base, after a batch", False, "older data: until 2026-11-02 00:00:00+00:00, candidate w"),
]


@pytest.mark.parametrize(("case", "newer", "sentence"), DATES)
def test_each_model_has_the_date_of_its_own_training_data(
    decided: dict[str, State], case: str, sentence: str, *, newer: bool
) -> None:
    decision, _ = decided[case].result()
    assert isinstance(decision, Decision)
    check = next(check for check in decision.checks if check.name == "newer training data")
    assert check.passed == newer
    assert sentence in check.sentence
    assert newer or decision.verdict == "keep"


UNREADABLE = [
    ("a champion without a manifest", f"{'f' * 64}.json holds nothing"),
    ("a champion without a record", "not recorded.json holds nothing"),
    ("a champion of a changed manifest", "it was changed after it was written"),
]


@pytest.mark.parametrize(("case", "sentence"), UNREADABLE)
def test_a_champion_whose_manifest_cannot_be_read_is_an_error_not_an_old_one(
    decided: dict[str, State], case: str, sentence: str
) -> None:
    with pytest.raises(ValueError, match=f"{case} was trained on cannot be .*{sentence}.*promoted"):
        decided[case].result()
