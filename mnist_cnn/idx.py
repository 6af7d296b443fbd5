"""IDX, the format of MNIST's archives: parsed and written."""

import math
import struct
import zlib

import numpy as np
from numpy.typing import NDArray

from mnist_cnn.digits import Digits

_IDX_UBYTE = 0x08


_MAX_IDX_BYTES = 1 << 31


_MAX_IDX_HEADER = 4 + 4 * 255


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
