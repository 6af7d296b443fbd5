"""Take the present snapshot of a data set, and download its base the first time."""

from typing import Annotated

from prefect import get_run_logger
from prefect.artifacts import create_table_artifact
from pydantic import StringConstraints

from expectations.reference import compare_profiles
from tasks.datasets.base import fetch_base
from tasks.datasets.catalog import AUTO
from tasks.datasets.ledger import present_snapshot, read_base, read_ledger, write_base
from tasks.datasets.mirror import MirrorUnreachable
from tasks.datasets.snapshots import read_profile, read_snapshot
from tasks.records import SPLITS, Snapshot, ValidatedSnapshot
from tasks.services.s3 import Store
from tasks.services.step import step

Dataset = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
"""The name of a data set: `mnist`, `digits`, `auto`, or one whose base lies in the store."""


@step
def take_snapshot(dataset: Dataset, store: str) -> Snapshot:
    """Return the present snapshot: the base of the data set and every batch accepted since.

    A data set without a base is downloaded, once. `mnist` comes from the mirror in `MNIST_MIRROR`
    (an http, https or file address of a folder with the four archives) or from torchvision's
    mirrors; `digits` is scikit-learn's embedded sample; `auto` is `mnist` if it can be downloaded,
    else `digits`; any other name has its four archives under `datasets/NAME/base/` in the store.
    Raises MirrorUnreachable, DatasetUnknown, and ValueError for archives that are corrupt or hold
    something else.
    """
    logger = get_run_logger()
    s3 = Store(store)
    name = "mnist" if dataset == AUTO else dataset
    base = read_base(s3, name)
    if base is None:
        try:
            base = fetch_base(name, s3)
        except MirrorUnreachable as error:
            if dataset != AUTO:
                raise
            logger.warning(
                "MNIST COULD NOT BE HAD: THIS RUN USES THE EMBEDDED SAMPLE of 1,797 digits. Its "
                "model is called digits-cnn and never competes with mnist-cnn. The cause: %s",
                error,
            )
            base = read_base(s3, "digits") or fetch_base("digits", s3)
    snapshot = present_snapshot(s3, base, read_ledger(s3, base.dataset))
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
    """Make a validated snapshot the base of its data set, if there is none yet.

    From then on the data set only grows. A base that failed validation is never accepted.
    """
    # A snapshot with a parent extends a base that was accepted before.
    if validated.snapshot.parent is None:
        write_base(Store(validated.snapshot.store), validated.snapshot)


@step
def compare_snapshots(dataset: Dataset, before: str, after: str, store: str) -> str:
    """Publish the shards added between two snapshots, given by digest, and the drift they brought.

    Returns a summary as a sentence. Raises FileNotFoundError for a digest of no snapshot,
    ValueError for one of another data set.
    """
    s3 = Store(store)
    old, new = (read_snapshot(s3, dataset, digest) for digest in (before, after))
    for split in SPLITS:
        known = {shard.digest for shard in old.shards(split)}
        added = [shard for shard in new.shards(split) if shard.digest not in known]
        create_table_artifact(
            [
                {"part": shard.digest[:12], "images": str(shard.images), "from": shard.origin}
                for shard in added
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
