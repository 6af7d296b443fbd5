"""Evaluate candidate and champion afresh on the same test images, clean and corrupted."""

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from prefect import get_run_logger, runtime

from mnist_cnn.device import follow_quota
from mnist_cnn.digits import Digits
from mnist_cnn.evaluation import Evaluation
from tasks import keys
from tasks.datasets.snapshots import read_snapshot, read_split
from tasks.records import ModelVersion, Snapshot
from tasks.registry.models import ModelUnusable, load_model
from tasks.registry.versions import read_version
from tasks.services.mlflow import registry_errors
from tasks.services.s3 import Store
from tasks.services.step import step

if TYPE_CHECKING:
    from torch import nn

    from mnist_cnn.evaluation import Outcomes

# Tolerated difference of accuracy: rounding on another device may flip the digit of a few images.
_DEVICE_DIFFERENCE = 0.002


@step
def evaluate_models(models: Mapping[str, str], snapshot: Snapshot) -> dict[str, Evaluation]:
    """Evaluate models, given as role and address, on the snapshot's test split.

    All models are evaluated on the very same images, and each image is corrupted only once. The
    outcome of every image is stored. Raises ModelUnusable for a model that does not load or
    classify; a "previous" that does not load is only left out, since no decision depends on it.
    """
    follow_quota()  # bounds torch's threads by the container's CPU quota
    loaded = {}
    for role, address in models.items():
        try:
            loaded[role] = load_model(address)
        except ModelUnusable as error:
            if role != "previous":
                raise
            get_run_logger().warning("the previous champion is not shown: %s", error)
    train = read_split(snapshot, "train")
    test = read_split(snapshot, "test")
    evaluations, outcomes = evaluate_networks(loaded, models, snapshot, (train, test))
    store = Store(snapshot.store)
    pictures = _draw(evaluations, outcomes["candidate"], loaded["candidate"][0], test)
    for name, picture in pictures.items():
        store.put(keys.picture(runtime.flow_run.id, name), picture)
    return evaluations


def evaluate_networks(
    loaded: "Mapping[str, tuple[nn.Module, int]]",
    models: Mapping[str, str],
    snapshot: Snapshot,
    splits: tuple[Digits, Digits],
) -> tuple[dict[str, Evaluation], "dict[str, Outcomes]"]:
    """Evaluate networks and store their outcomes; return evaluations and outcomes by role.

    `loaded` holds each network with the size of its file, bytes. `splits` are the snapshot's
    training and test images. Raises ModelUnusable for a network that does not classify.
    """
    from mnist_cnn.evaluation import evaluate, measure_all
    from mnist_cnn.evaluation.cost import measure_size, measure_times
    from mnist_cnn.evaluation.shift import measure_shift

    logger = get_run_logger()
    train, test = splits
    networks = {role: network for role, (network, _) in loaded.items()}
    try:
        # All at once: each corruption is drawn once and every network predicts the same pixels.
        measured = measure_all(networks, test)
    except ValueError as error:
        raise ModelUnusable(
            f"{error}; the addresses are {dict(models)}: roll back to a version that works, "
            "or retrain"
        ) from error
    shift = measure_shift(train, test)
    store = Store(snapshot.store)
    evaluations = {}
    for role, outcomes in measured.items():
        network, file_bytes = loaded[role]
        evaluations[role] = evaluate(
            outcomes,
            test,
            model=models[role],
            snapshot=snapshot.digest,
            outcomes=store.put(keys.outcomes(runtime.flow_run.id, role), _packed(outcomes)),
            shift=shift,
            size=measure_size(network, file_bytes=file_bytes),
            times=measure_times(network, test.images, outcomes.seconds),
        )
        store.put(
            keys.evaluation(runtime.flow_run.id, role),
            evaluations[role].model_dump_json(indent=1).encode(),
        )
        logger.info("%s %s: accuracy %.4f", role, models[role], evaluations[role].accuracy)
        for gap in evaluations[role].gaps:
            logger.warning("%s was not measured completely: %s", role, gap)
    return evaluations, measured


@step
@registry_errors("the version to try")
def try_version(version: ModelVersion, store: str) -> float:
    """Load a version and return its accuracy on the test split of its own snapshot.

    Raises ModelUnusable if it does not load, or if its accuracy differs from the recorded one by
    more than another device explains.
    """
    from mnist_cnn.evaluation import predict

    network, _ = load_model(version.model)
    dataset = version.name.removesuffix("-cnn")
    test = read_split(read_snapshot(Store(store), dataset, version.snapshot), "test")
    # (N, 28, 28) uint8 -> (N, 10) -> (N,)
    accuracy = float((predict(network, test.images).argmax(1) == test.labels).mean())
    _, tags = read_version(version.name, int(version.version))
    expected = tags.accuracy
    if abs(accuracy - expected) > _DEVICE_DIFFERENCE:
        raise ModelUnusable(
            f"{version.model} loads, but has accuracy {accuracy:.4f} on the test images on which "
            f"it had {expected:.4f} when it was evaluated: choose another version, or retrain"
        )
    get_run_logger().info("%s loads and has accuracy %.4f", version.model, accuracy)
    return accuracy


def _draw(
    evaluations: Mapping[str, Evaluation], outcomes: "Outcomes", model: "nn.Module", test: Digits
) -> dict[str, bytes]:
    """Draw the pictures of the candidate's card; return PNGs by name."""
    from mnist_cnn.evaluation import plots

    ours = evaluations["candidate"]
    theirs = evaluations.get("champion")
    return {
        "confusion": plots.plot_confusion(ours),
        "factors": plots.plot_factors(ours, theirs),
        "slices": plots.plot_slices(ours, theirs),
        "reliability": plots.plot_reliability(ours, theirs),
        "errors": plots.plot_errors(outcomes, test),
        "corruptions": plots.plot_corruptions(test, outcomes.seed),
        "examination": plots.plot_examination(model, outcomes, test),
    }


def _packed(outcomes: "Outcomes") -> bytes:
    # No pickle: loading one runs code.
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, **outcomes.arrays())
    return content.getvalue()
