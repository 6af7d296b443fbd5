"""The archives of MNIST, from one of its mirrors."""

import base64
import hashlib
import os
from http.client import HTTPException
from urllib.parse import unquote_to_bytes
from urllib.request import Request, urlopen

from mnist_cnn.digits import Digits
from mnist_cnn.idx import digits_from_idx
from tasks.services.addresses import without_credentials

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
        # Credentials are recognised behind a scheme, which may be what is missing.
        shown = without_credentials(chosen if "://" in chosen else f"://{chosen}")
        raise ValueError(
            f"MNIST_MIRROR is {shown.removeprefix('://')!r}; expected an http://, https:// or "
            "file:// address of a folder that holds the four MNIST archives"
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
            with urlopen(_request(mirror + name), timeout=30) as response:  # noqa: S310 - schemes are checked
                content: bytes = response.read(_MAX_ARCHIVE_BYTES)
        except (OSError, HTTPException) as error:
            faults.append(f"{without_credentials(mirror)}: {error}")
            continue
        # Torchvision publishes MD5 alone. It finds damage, no more: hence `usedforsecurity`.
        found = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if found != md5:
            raise ValueError(
                f"{without_credentials(mirror)}{name} is not MNIST's archive: its MD5 is {found}, "
                f"not {md5}; it is truncated, corrupt or something else: fetch it again or use "
                "another mirror"
            )
        return content
    raise MirrorUnreachable(
        f"{name} could not be fetched ({'; '.join(faults)}); set MNIST_MIRROR to an http(s):// or "
        "file:// folder that holds the four MNIST archives, or choose the data set 'digits'"
    )


def _request(address: str) -> Request:
    """Return a request with the credentials of an address in a header.

    In the address urllib reads them as host and port, and quotes them in its errors.
    """
    public = without_credentials(address)
    request = Request(public)  # noqa: S310 - schemes are checked
    rest = address.partition("://")[2]
    if user := rest[: len(address) - len(public)].removesuffix("@"):
        word = base64.b64encode(unquote_to_bytes(user)).decode()
        # Not sent to the server that the first one redirects to.
        request.add_unredirected_header("Authorization", f"Basic {word}")
    return request
