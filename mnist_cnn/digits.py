"""Digits in memory, and the two formats that they are read from."""

import hashlib
import math
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SIDE = 28
"""Height and width of an image, pixels."""

CLASSES = 10
"""The digits 0 to 9."""

_IDX_UBYTE = 0x08
_MAX_IDX_BYTES = 1 << 31
_MAX_IDX_HEADER = 4 + 4 * 255


@dataclass(frozen=True, eq=False)
class Digits:
    """Labelled images of one split.

    `images` is uint8 (N, 28, 28), 0 for background and 255 for ink; `labels` is int64 (N,), each
    0 to 9. Raises ValueError on anything else.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def __post_init__(self) -> None:
        if self.images.dtype != np.uint8 or self.images.shape[1:] != (SIDE, SIDE):
            raise ValueError(
                f"images are {self.images.dtype} of shape {self.images.shape}; "
                f"expected uint8 of shape (N, {SIDE}, {SIDE})"
            )
        if self.labels.dtype != np.int64 or self.labels.ndim != 1:
            raise ValueError(
                f"labels are {self.labels.dtype} of shape {self.labels.shape}; "
                "expected int64 of shape (N,)"
            )
        if len(self.images) != len(self.labels):
            raise ValueError(
                f"{len(self.images)} images but {len(self.labels)} labels; expected one label "
                "for each image: check that both files belong to the same split"
            )
        outside = self.labels[(self.labels < 0) | (self.labels >= CLASSES)]
        if len(outside):
            raise ValueError(
                f"{len(outside)} labels are outside 0-9, the first is {outside[0]}; "
                "expected the digits 0 to 9"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, start: int, stop: int) -> "Digits":
        """Return images and labels `start` to `stop` without copying them."""
        return Digits(self.images[start:stop], self.labels[start:stop])

    def digest(self) -> str:
        """Return the sha256 of shapes, images and labels as 64 hexadecimal characters."""
        state = hashlib.sha256(f"{self.images.shape}".encode())
        state.update(np.ascontiguousarray(self.images).data)
        state.update(np.ascontiguousarray(self.labels).data)
        return state.hexdigest()


def parse_idx(content: bytes, name: str, limit: int = _MAX_IDX_BYTES) -> NDArray[np.uint8]:
    """Return the uint8 array held by an IDX file, gzipped or not.

    `name` appears in the ValueError that a truncated, corrupt or foreign file raises, or one that
    promises more than `limit` bytes. Memory is taken for what the header promises and no more, so
    that a bomb ends in a sentence. The format is described at http://yann.lecun.com/exdb/mnist/.
    """
    gzipped = content[:2] == b"\x1f\x8b"
    head = _gunzip(content, name, _MAX_IDX_HEADER)[0] if gzipped else content[:_MAX_IDX_HEADER]
    if len(head) < 4 or head[:2] != b"\x00\x00" or head[2] != _IDX_UBYTE:  # noqa: PLR2004
        raise ValueError(
            f"{name} starts with {head[:4].hex()!r}; expected the IDX magic '000008' and the "
            "number of dimensions: it is not an IDX file of unsigned bytes"
        )
    dimensions = head[3]
    header = 4 + 4 * dimensions
    if len(head) < header:
        raise ValueError(f"{name} ends inside its header: {len(head)} of {header} bytes")
    shape = struct.unpack(f">{dimensions}I", head[4:header])
    promised = math.prod(shape)
    if promised > limit:
        raise ValueError(
            f"{name} promises {promised} values of shape {shape}; expected at most {limit}"
        )
    ended = True
    if gzipped:
        content, ended = _gunzip(content, name, header + promised + 1)
    held = len(content) - header
    if promised != held:
        more = "" if ended else "more than "
        raise ValueError(
            f"{name} promises {promised} values of shape {shape} but holds {more}"
            f"{held if ended else promised}; fetch it again"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _gunzip(content: bytes, name: str, most: int) -> tuple[bytes, bool]:
    """Return what `content` unpacks to, at most `most` bytes, and whether that is all of it."""
    inflate = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    try:
        plain = inflate.decompress(content, most)
    except zlib.error as error:
        raise ValueError(f"{name} is a corrupt gzip file ({error}); fetch it again") from error
    if len(plain) < most and not inflate.eof:
        raise ValueError(f"{name} is a truncated gzip file; fetch it again")
    if inflate.unused_data:
        raise ValueError(
            f"{name} goes on for {len(inflate.unused_data)} bytes after its gzip data has ended; "
            "expected one gzip file and nothing behind it"
        )
    return plain, inflate.eof


def write_idx(array: NDArray[np.uint8]) -> bytes:
    """Return the IDX file, not gzipped, that holds a uint8 array: what `parse_idx` reads."""
    if array.dtype != np.uint8:
        raise ValueError(f"the array is {array.dtype}; expected uint8")
    head = struct.pack(f">HBB{array.ndim}I", 0, _IDX_UBYTE, array.ndim, *array.shape)
    return head + array.tobytes()


def digits_from_idx(images: bytes, labels: bytes, name: str) -> Digits:
    """Parse an IDX pair into `Digits`; ValueError names the file and what is wrong with it."""
    pixels = parse_idx(images, f"{name}-images")
    return Digits(pixels, parse_idx(labels, f"{name}-labels").astype(np.int64))


def embedded_sample() -> tuple[Digits, Digits]:
    """Return scikit-learn's 1,797 handwritten digits as a training and a test split.

    Source: E. Alpaydin, C. Kaynak, UCI Optical Recognition of Handwritten Digits (1998), whose
    test part, by 13 writers, scikit-learn carries. The 8 x 8 images of 0-16 are scaled to 20 x 20
    and centred in 28 x 28, as MNIST's are. Every fifth image is in the test split; the writers'
    names are not kept, so that unlike MNIST's this split is not writer-disjoint.
    """
    from scipy.ndimage import zoom  # noqa: PLC0415 - only the sample needs it
    from sklearn.datasets import load_digits  # noqa: PLC0415

    raw = load_digits()
    scaled = zoom(raw.images, (1, 20 / 8, 20 / 8), order=1, grid_mode=True, mode="nearest")
    pixels = np.clip(np.rint(scaled * (255 / 16)), 0, 255).astype(np.uint8)
    margin = (SIDE - 20) // 2
    images = np.pad(pixels, ((0, 0), (margin, margin), (margin, margin)))
    labels = raw.target.astype(np.int64)
    test = np.arange(len(labels)) % 5 == 4  # noqa: PLR2004
    return Digits(images[~test], labels[~test]), Digits(images[test], labels[test])
