"""The archives of MNIST, from one of its mirrors."""

import hashlib
import os
from http.client import HTTPException
from urllib.request import urlopen

from mnist_cnn.digits import Digits
from mnist_cnn.idx import digits_from_idx

_MAX_ARCHIVE_BYTES = 64 << 20  # six times the largest of MNIST's archives


class MirrorUnreachable(ConnectionError):
    """No mirror has delivered the MNIST archives; worth another try."""


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
