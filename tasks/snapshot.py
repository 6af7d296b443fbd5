"""Know the present snapshot of a data set, and fetch what a data set begins with."""

import hashlib
import os
from http.client import HTTPException
from typing import Annotated
from urllib.request import urlopen

from prefect import get_run_logger
from prefect.artifacts import create_table_artifact
from pydantic import StringConstraints

from expectations.reference import compare_profiles
from mnist_cnn.digits import Digits, digits_from_idx, embedded_sample
from tasks.ledger import present_snapshot, read_base, read_ledger, write_base
from tasks.records import SPLITS, Snapshot, ValidatedSnapshot
from tasks.shards import read_profile, read_snapshot, write_snapshot
from tasks.step import step
from tasks.storage import Store

Dataset = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
"""The name of a data set: `mnist`, `digits`, `auto`, or one whose base lies in the store."""

BASE_ARCHIVES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
"""What a data set of one's own begins with, under `datasets/NAME/base/`."""

_MAX_ARCHIVE_BYTES = 64 << 20  # six times the largest of MNIST's archives


class MirrorUnreachable(ConnectionError):
    """The MNIST archives could not be had from anywhere."""


class DatasetUnknown(ValueError):
    """A data set is neither known by name nor has a base in the store."""


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


def _fetch(name: str, store: Store) -> Snapshot:
    if name == "mnist":
        train, test = fetch_mnist()
        origin = "MNIST archives of LeCun, Cortes and Burges"
    elif name == "digits":
        train, test = embedded_sample()
        origin = "scikit-learn load_digits, scaled to 28 x 28"
    else:
        train, test = _read_archives(name, store)
        origin = f"archives under datasets/{name}/base/"
    return write_snapshot(store, name, train, test, origin)


def _read_archives(name: str, store: Store) -> tuple[Digits, Digits]:
    folder = f"datasets/{name}/base/"
    there = store.names(folder)
    if missing := [each for each in BASE_ARCHIVES if f"{folder}{each}" not in there]:
        raise DatasetUnknown(
            f"data set {name!r} is neither mnist nor digits, and {store.address_of(folder)} lacks "
            f"{', '.join(missing)}: correct the name, or put the IDX archives there that the data "
            "set begins with"
        )
    archives = [store.get(f"{folder}{each}") for each in BASE_ARCHIVES]
    train = digits_from_idx(archives[0], archives[1], "train")
    return train, digits_from_idx(archives[2], archives[3], "t10k")


def fetch_mnist() -> tuple[Digits, Digits]:
    """Return MNIST's training and test split from the first mirror that has them.

    Names, checksums and the default mirrors are torchvision's; its downloader is not used because
    it waits for ever for a mirror that stops sending, and does not read file:// addresses.
    """
    from torchvision.datasets import MNIST  # noqa: PLC0415 - 2 s to import

    chosen = os.environ.get("MNIST_MIRROR")
    if chosen and not chosen.startswith(("http://", "https://", "file://")):
        raise ValueError(
            f"MNIST_MIRROR is {chosen!r}; expected an http://, https:// or file:// address of a "
            "folder that holds the four MNIST archives"
        )
    mirrors = [f"{chosen.rstrip('/')}/"] if chosen else list(MNIST.mirrors)
    archives = [_download(name, md5, mirrors) for name, md5 in MNIST.resources]
    train = digits_from_idx(archives[0], archives[1], "train")
    test = digits_from_idx(archives[2], archives[3], "t10k")
    return train, test


def _download(name: str, md5: str, mirrors: list[str]) -> bytes:
    """Fetch one archive from the first mirror that has it; its checksum must be the published."""
    silent = []
    for mirror in mirrors:
        try:
            with urlopen(mirror + name, timeout=30) as answer:  # noqa: S310 - schemes are checked
                content: bytes = answer.read(_MAX_ARCHIVE_BYTES)
        except (OSError, HTTPException) as error:
            silent.append(f"{mirror}: {error}")
            continue
        found = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if found != md5:
            raise ValueError(
                f"{mirror}{name} is not MNIST's archive: its MD5 is {found}, not {md5}; it is "
                "truncated, corrupt or something else: fetch it again or use another mirror"
            )
        return content
    raise MirrorUnreachable(
        f"{name} could not be fetched ({'; '.join(silent)}); set MNIST_MIRROR to an http(s):// or "
        "file:// folder that holds the four MNIST archives, or choose the data set 'digits'"
    )
