"""Know the present snapshot of a data set, and fetch what a data set begins with."""

from typing import Annotated

from prefect import get_run_logger
from prefect.artifacts import create_table_artifact
from pydantic import StringConstraints

from expectations.reference import compare_profiles
from tasks.datasets.base import MirrorUnreachable, _fetch
from tasks.datasets.ledger import present_snapshot, read_base, read_ledger, write_base
from tasks.datasets.snapshots import read_profile, read_snapshot
from tasks.records import SPLITS, Snapshot, ValidatedSnapshot
from tasks.services.s3 import Store
from tasks.services.step import step

Dataset = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
"""The name of a data set: `mnist`, `digits`, `auto`, or one whose base lies in the store."""


@step
def take_snapshot(dataset: Dataset, store: str) -> Snapshot:
    """Return the present snapshot: what the data set began with, and every batch accepted since.

    A data set that has not begun is fetched, once. `mnist` comes from the mirror in `MNIST_MIRROR`
    (an http, https or file address of a folder with the four archives) or from torchvision's
    mirrors; `digits` is scikit-learn's embedded sample; `auto` is `mnist` if it can be had, else
    `digits`; any other name has its four archives under `datasets/NAME/base/` in the store. Raises
    MirrorUnreachable, DatasetUnknown, and ValueError for archives that are corrupt or hold
    something else.
    """
    logger, place = get_run_logger(), Store(store)
    name = "mnist" if dataset == "auto" else dataset
    base = read_base(place, name)
    if base is None:
        try:
            base = _fetch(name, place)
        except MirrorUnreachable as error:
            if dataset != "auto":
                raise
            logger.warning(
                "MNIST COULD NOT BE HAD: THIS RUN USES THE EMBEDDED SAMPLE of 1,797 digits. Its "
                "model is called digits-cnn and never competes with mnist-cnn. The cause: %s",
                error,
            )
            base = read_base(place, "digits") or _fetch("digits", place)
    snapshot = present_snapshot(place, base, read_ledger(place, base.dataset))
    logger.info(
        "snapshot %s of %s: %d training and %d test images",
        snapshot.digest[:12],
        snapshot.dataset,
        snapshot.images("train"),
        snapshot.images("test"),
    )
    return snapshot


@step
def accept_base(validated: ValidatedSnapshot) -> None:
    """Let the data set begin with what was validated, if it has not begun; now it only grows."""
    if validated.snapshot.parent is None:
        write_base(Store(validated.snapshot.store), validated.snapshot)


@step
def compare_snapshots(dataset: Dataset, before: str, after: str, store: str) -> str:
    """Publish what came in between two snapshots, given by their digests, and what it changed.

    Returns a sentence. Raises FileNotFoundError for a digest of no snapshot, ValueError for one of
    another data set.
    """
    place = Store(store)
    old, new = (read_snapshot(place, dataset, digest) for digest in (before, after))
    for split in SPLITS:
        there = {shard.digest for shard in old.shards(split)}
        came = [shard for shard in new.shards(split) if shard.digest not in there]
        create_table_artifact(
            [
                {"part": shard.digest[:12], "images": str(shard.images), "from": shard.origin}
                for shard in came
            ],
            key=f"came-in-{split}",
            description=f"What is in {after[:12]} and not in {before[:12]}, {split} split",
        )
    changes = compare_profiles(read_profile(old), read_profile(new))
    rows = [
        {
            "figure": change.feature.replace("_", " "),
            "before": f"{change.before:.4f}",
            "after": f"{change.after:.4f}",
            "stability index": ""
            if change.stability_index is None
            else f"{change.stability_index:.4f}",
        }
        for change in changes
    ]
    create_table_artifact(
        rows, key="changes", description=f"Training images of {before[:12]} and {after[:12]}"
    )
    for row in rows:
        get_run_logger().info("  ".join(row.values()))
    farthest = max(changes, key=lambda change: change.stability_index or 0)
    return (
        f"{old.images('train'):,} training images became {new.images('train'):,}; what moved most "
        f"is {farthest.feature.replace('_', ' ')}, stability index {farthest.stability_index:.4f}"
    )
