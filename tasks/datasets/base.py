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
    """No mirror has delivered the MNIST archives; worth another try."""


def _fetch(name: str, store: Store) -> Snapshot:
    """Download the base of a data set and write it as a snapshot."""
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
    """Read training and test split of a data set of one's own from its archives in the store."""
    folder = f"datasets/{name}/base/"
    present = store.names(folder)
    if missing := [each for each in BASE_ARCHIVES if f"{folder}{each}" not in present]:
        raise DatasetUnknown(
            f"data set {name!r} is neither mnist nor digits, and {store.address_of(folder)} lacks "
            f"{', '.join(missing)}: correct the name, or put the IDX archives there that the data "
            "set begins with"
        )
    archives = [store.get(f"{folder}{each}") for each in BASE_ARCHIVES]
    train = digits_from_idx(archives[0], archives[1], "train")
    return train, digits_from_idx(archives[2], archives[3], "t10k")


def fetch_mnist() -> tuple[Digits, Digits]:
    """Download MNIST's training and test split from the first mirror that has them.

    Names, checksums and the default mirrors are torchvision's. Its downloader is not used, because
    it waits for ever when a mirror stops sending, and does not read file:// addresses. Raises
    MirrorUnreachable, and ValueError for an archive with another checksum or a malformed
    `MNIST_MIRROR`.
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
    """Download one archive from the first mirror that has it, and verify its published MD5."""
    faults = []
    for mirror in mirrors:
        try:
            with urlopen(mirror + name, timeout=30) as response:  # noqa: S310 - schemes are checked
                content: bytes = response.read(_MAX_ARCHIVE_BYTES)
        except (OSError, HTTPException) as error:
            faults.append(f"{mirror}: {error}")
            continue
        # Torchvision publishes MD5 alone. It finds damage, no more: hence `usedforsecurity`.
        found = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if found != md5:
            raise ValueError(
                f"{mirror}{name} is not MNIST's archive: its MD5 is {found}, not {md5}; it is "
                "truncated, corrupt or something else: fetch it again or use another mirror"
            )
        return content
    raise MirrorUnreachable(
        f"{name} could not be fetched ({'; '.join(faults)}); set MNIST_MIRROR to an http(s):// or "
        "file:// folder that holds the four MNIST archives, or choose the data set 'digits'"
    )


BASE_ARCHIVES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
"""Archives of a data set of one's own, under `datasets/NAME/base/`."""


_MAX_ARCHIVE_BYTES = 64 << 20  # six times the largest of MNIST's archives


class DatasetUnknown(ValueError):
    """The data set is neither known by name nor has its archives in the store."""
