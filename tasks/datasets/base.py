"""The base of a data set: fetched once from a mirror, the store or the embedded sample."""

import hashlib
import os
from http.client import HTTPException
from urllib.request import urlopen

from mnist_cnn.digits import Digits
from mnist_cnn.idx import digits_from_idx
from mnist_cnn.sample import embedded_sample
from tasks.datasets.snapshots import write_snapshot
from tasks.records import Snapshot
from tasks.services.s3 import Store


class MirrorUnreachable(ConnectionError):
    """The MNIST archives could not be had from anywhere."""


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
    from torchvision.datasets import MNIST

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


BASE_ARCHIVES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
"""What a data set of one's own begins with, under `datasets/NAME/base/`."""


_MAX_ARCHIVE_BYTES = 64 << 20  # six times the largest of MNIST's archives


class DatasetUnknown(ValueError):
    """A data set is neither known by name nor has a base in the store."""
