"""Decide on a promotion: gather the evaluations, decide purely, store the record."""

import io
from datetime import UTC, datetime

import numpy as np
from prefect import get_run_logger, runtime

from mnist_cnn.digits import Digits
from mnist_cnn.evaluation import Evaluation
from mnist_cnn.promotion import Decision, PromotionPolicy, ReuseHistory, Scored, decide
from mnist_cnn.record import Record
from tasks import keys
from tasks.datasets.snapshots import read_snapshot, read_split
from tasks.records import ModelVersion, Snapshot
from tasks.services.s3 import Store
from tasks.services.step import step


class _Decided(Record):
    """An earlier decision, as far as a new one depends on it; its other fields may have changed."""

    candidate: str
    champion: str | None


@step
def decide_promotion(
    candidate: Evaluation,
    champion: tuple[Evaluation, ModelVersion] | None,
    snapshot: Snapshot,
    policy: PromotionPolicy | None,
) -> tuple[Decision, str]:
    """Decide whether the candidate replaces the champion; return the decision and its address.

    All decisions on a test split are stored in one folder, promotions and rejections alike, so that
    they can be counted. A repeat within the same flow run returns the earlier decision against the
    same champion. `snapshot` is the one that both were evaluated on and that the candidate was
    trained on. Raises ValueError if the manifest of the champion's snapshot cannot be read.
    """
    store = Store(snapshot.store)
    test = read_split(snapshot, "test")
    test_split = test.digest()
    # A name begins with the time, so these are in order.
    earlier = store.names(keys.decisions(snapshot.dataset, test_split))
    decided = [_Decided.model_validate_json(store.get(name)) for name in earlier]
    against = champion[0].model if champion else None
    # A retry keeps its decision, which may have been carried out already. Once the champion is
    # another, the run decides anew.
    for name, made in zip(earlier, decided, strict=True):
        if name.endswith(f"{runtime.flow_run.id}.json") and made.champion == against:
            return Decision.model_validate_json(store.get(name)), store.address_of(name)
    history = ReuseHistory(test_split, tuple(decision.candidate for decision in decided))
    ours = score(candidate, store, test, test_split, snapshot.until)
    theirs = None
    if champion:
        # The champion's data may be older than the snapshot it is evaluated on.
        measured, version = champion
        theirs = score(measured, store, test, test_split, _data_until(version, snapshot))
    decision = decide(ours, theirs, policy, history)
    name = f"{datetime.now(UTC):%Y-%m-%dT%H-%M-%S.%f}-{runtime.flow_run.id}.json"
    address = store.put(
        keys.decisions(snapshot.dataset, test_split, name),
        decision.model_dump_json(indent=1).encode(),
    )
    get_run_logger().info("%s: %s", decision.verdict, decision.reason)
    return decision, address


def score(
    measured: Evaluation, store: Store, test: Digits, test_split: str, until: datetime | None
) -> Scored:
    """Return an evaluation's figures together with the outcome of every image.

    `until` is the time of the newest batch in the model's training data, None without one.
    """
    arrays = np.load(io.BytesIO(store.get(store.name_of(measured.outcomes))), allow_pickle=False)
    # (N, 10) -> (N,) bool
    right = arrays["probabilities"].argmax(1) == test.labels
    return Scored(
        model=measured.model,
        snapshot=measured.snapshot,
        test_split=test_split,
        labels=test.labels,
        right=right,
        # Every other array holds predicted digits under one factor: (N,) -> (N,) bool
        factors={
            name: arrays[name] == test.labels for name in arrays.files if name != "probabilities"
        },
        data_until=until,
        shifted_prior_accuracy=measured.priors.worst.accuracy,
        calibration_error=measured.calibration.expected_error,
        error_confidence=measured.confidence.when_wrong,
        latency_ms=measured.times.single_image_ms if measured.times else None,
        size_bytes=measured.size.file_bytes if measured.size else None,
    )


def _data_until(champion: ModelVersion, snapshot: Snapshot) -> datetime | None:
    """Return the time of the newest batch in the champion's training data."""
    if champion.snapshot == snapshot.digest:
        return snapshot.until
    try:
        manifest = read_snapshot(Store(snapshot.store), snapshot.dataset, champion.snapshot)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(
            f"what the champion {champion.model} was trained on cannot be read ({error}), so "
            "nobody knows whether the candidate was trained on newer data; nothing is promoted: "
            "restore that manifest, name the store that holds it, or roll back to a version whose "
            "manifest is there"
        ) from error
    return manifest.until
