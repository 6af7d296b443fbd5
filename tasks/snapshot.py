"""Fetch a data set and keep it as an immutable snapshot."""

import hashlib
import os
from http.client import HTTPException
from typing import Literal
from urllib.request import urlopen

from prefect import get_run_logger, task

from mnist_cnn.digits import Digits, digits_from_idx, embedded_sample
from tasks.records import Snapshot
from tasks.storage import Store, worth_another_try, write_snapshot

Dataset = Literal["mnist", "digits", "auto"]

_MAX_ARCHIVE_BYTES = 64 << 20  # six times the largest of MNIST's archives


class MirrorUnreachable(ConnectionError):
    """The MNIST archives could not be had from anywhere."""


@task(retries=2, retry_delay_seconds=[2, 10], retry_condition_fn=worth_another_try)
def take_snapshot(dataset: Dataset, store: str) -> Snapshot:
    """Fetch `dataset`, write it to `store` and return its snapshot.

    `mnist` comes from the mirror in `MNIST_MIRROR` (an http, https or file address of a folder with
    the four archives) or from torchvision's mirrors; `digits` is scikit-learn's embedded sample;
    `auto` is `mnist` if it can be had, else `digits`. Raises MirrorUnreachable, and ValueError for
    archives that are corrupt or hold something else.
    """
    logger = get_run_logger()
    name, origin = dataset, "scikit-learn load_digits, scaled to 28 x 28"
    if dataset != "digits":
        try:
            train, test = fetch_mnist()
            name, origin = "mnist", "MNIST archives of LeCun, Cortes and Burges"
        except MirrorUnreachable as error:
            if dataset == "mnist":
                raise
            logger.warning(
                "MNIST COULD NOT BE HAD: THIS RUN USES THE EMBEDDED SAMPLE of 1,797 digits. Its "
                "model is called digits-cnn and never competes with mnist-cnn. The cause: %s",
                error,
            )
            name = "digits"
    if name == "digits":
        train, test = embedded_sample()
    snapshot = write_snapshot(Store(store), name, train, test, origin)
    logger.info(
        "snapshot %s of %s: %d training and %d test images",
        snapshot.digest[:12],
        name,
        snapshot.images("train"),
        snapshot.images("test"),
    )
    return snapshot


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
