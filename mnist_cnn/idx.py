"""IDX, the format of MNIST's archives: parse and write."""

import math
import struct
import zlib

import numpy as np
from numpy.typing import NDArray

from mnist_cnn.digits import Digits

_IDX_UBYTE = 0x08
_MAX_IDX_BYTES = 1 << 31
_MOST_DIMENSIONS = 64
"""Maximum number of dimensions that NumPy's arrays may have."""
_MAGIC = 4
"""Bytes before the sizes: two zeros, the type of the values, the number of dimensions."""
_MAX_IDX_HEADER = _MAGIC + 4 * 255
"""Bytes of a header with as many dimensions as one byte can count."""


def parse_idx(content: bytes, name: str, limit: int = _MAX_IDX_BYTES) -> NDArray[np.uint8]:
    """Return the uint8 array of an IDX file, gzipped or not.

    Raises ValueError, with `name` in it, for a file that is truncated, corrupt, in another format,
    or longer than `limit` bytes by its header. No more memory is used than the header states, so
    that a gzip bomb is refused as well. Source of the format: http://yann.lecun.com/exdb/mnist/.
    """
    gzipped = content[:2] == b"\x1f\x8b"
    head = _gunzip(content, name, _MAX_IDX_HEADER)[0] if gzipped else content[:_MAX_IDX_HEADER]
    if len(head) < _MAGIC or head[:2] != b"\x00\x00" or head[2] != _IDX_UBYTE:
        raise ValueError(
            f"{name} starts with {head[:4].hex()!r}; expected the IDX magic '000008' and the "
            "number of dimensions: it is not an IDX file of unsigned bytes"
        )
    dimensions = head[3]
    if dimensions > _MOST_DIMENSIONS:
        raise ValueError(
            f"{name} promises {dimensions} dimensions; expected 1 for labels or 3 for images"
        )
    header = _MAGIC + 4 * dimensions
    if len(head) < header:
        raise ValueError(f"{name} ends inside its header: {len(head)} of {header} bytes")
    shape = struct.unpack(f">{dimensions}I", head[_MAGIC:header])
    promised = math.prod(shape)
    if promised > limit:
        raise ValueError(
            f"{name} promises {promised} values of shape {shape}; expected at most {limit}"
        )
    ended = True
    if gzipped:
        # One byte more than promised is enough to find a longer file.
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
    """Return at most `most` decompressed bytes, and True if these are all of them."""
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
    """Return an IDX file, not gzipped, of a uint8 array; the inverse of `parse_idx`."""
    if array.dtype != np.uint8:
        raise ValueError(f"the array is {array.dtype}; expected uint8")
    head = struct.pack(f">HBB{array.ndim}I", 0, _IDX_UBYTE, array.ndim, *array.shape)
    return head + array.tobytes()


def digits_from_idx(images: bytes, labels: bytes, name: str) -> Digits:
    """Parse an IDX pair into `Digits`; raise ValueError, with the file's name, if it is unfit."""
    pixels = parse_idx(images, f"{name}-images")
    return Digits(pixels, parse_idx(labels, f"{name}-labels").astype(np.int64))
