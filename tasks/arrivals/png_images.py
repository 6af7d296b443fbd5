"""Decode untrusted small greyscale PNGs, thousands at a time.

Without a library: images of one size and pixel format need few lines, their row filters are undone
for all images at once (five times as many a second as Pillow), and no C code but zlib's reads
untrusted bytes. Chunks, pixel formats and filters follow https://www.w3.org/TR/png/.
"""

import struct
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Size = tuple[int, int]
"""Height and width, pixels."""

MAX_SIDE = 64
"""Maximum height and width, pixels: enough for 32 x 32 to reach the expectations."""

MAX_PNG_BYTES = 16 << 10
"""Maximum bytes of one PNG: four times the pixels of the largest, for texts and profiles in it."""

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOURS = {
    0: "greyscale",
    2: "colour",
    3: "palette",
    4: "greyscale with alpha",
    6: "colour with alpha",
}
_GREYSCALE = 0
_DEPTH = 8  # bits a pixel
_HEADER = struct.Struct(">IIBBBBB")  # IHDR: width, height, depth, colour type and three methods

# Row filters; 0 leaves the row as it is.
_SUB = 1
_UP = 2
_AVERAGE = 3
_PAETH = 4


class _BadImage(ValueError):
    """One PNG cannot be read; the message continues a sentence that begins with "image N "."""


def decode(
    pngs: Sequence[bytes | None], side: Size | None
) -> tuple[Size | None, NDArray[np.uint8], dict[int, str]]:
    """Return the images' size, their pixels, uint8 (N, height, width), and the errors by row.

    All images must have the size `side`, or without it that of the first. With any error there are
    no pixels, and the size is None if no image could be read. An error continues a sentence that
    begins with "image N ".
    """
    lines: list[bytes] = []
    refused: dict[int, str] = {}
    for row, png in enumerate(pngs):
        try:
            side, line = _filtered_lines(png, side)
            lines.append(line)
        except _BadImage as error:
            refused[row] = str(error)
    if refused or side is None:
        return side, np.empty((0, 0, 0), np.uint8), refused
    height, width = side
    joined = np.frombuffer(b"".join(lines), np.uint8)
    joined = joined.reshape(-1, height, 1 + width)  # (N, height, filter and pixels)
    foreign = (joined[:, :, 0] > _PAETH).any(axis=1)  # (N,)
    if foreign.any():
        rows = np.flatnonzero(foreign).tolist()
        return (
            side,
            np.empty((0, 0, 0), np.uint8),
            dict.fromkeys(rows, "has a row filter beyond PNG's five"),
        )
    return side, _unfiltered(joined), {}


def _filtered_lines(png: bytes | None, side: Size | None) -> tuple[tuple[int, int], bytes]:
    """Return a PNG's size and its inflated lines, each behind the number of its filter.

    Signature, sizes, pixel format and checksums are checked first. No more bytes are unpacked than
    the size needs, and one, which shows that there are more.
    """
    if png is None:
        raise _BadImage("is null; expected a PNG")
    if png[:8] != _SIGNATURE:
        raise _BadImage(f"begins with {png[:8].hex()!r}; expected a PNG's {_SIGNATURE.hex()!r}")
    chunks = _chunks(png)
    height, width = size = _size(*next(chunks, (b"IEND", b"")), side)
    packed = []
    for kind, data in chunks:
        if kind == b"IDAT":
            packed.append(data)
        elif kind == b"tRNS" or not kind[0] & 0x20:  # a capital: it may not be skipped
            raise _BadImage(f"has a chunk {_ascii(kind)}; expected opaque greyscale, no palette")
    promised = height * (1 + width)
    inflate = zlib.decompressobj()
    try:
        lines = inflate.decompress(b"".join(packed), promised + 1)
    except zlib.error as error:
        raise _BadImage(f"has corrupt pixels ({error}); send it again") from error
    if len(lines) != promised or not inflate.eof:
        held = f"more than {promised}" if len(lines) > promised else f"{len(lines)}, cut off"
        raise _BadImage(f"promises {promised} bytes of lines but holds {held}; send it again")
    return size, lines


def _chunks(png: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield type and data of each chunk before IEND, with its checksum verified."""
    at = len(_SIGNATURE)
    while True:
        # Length and type before the data, a checksum of type and data behind it: 12 bytes at least.
        length, kind = struct.unpack_from(">I4s", png, at) if at + 12 <= len(png) else (0, b"")
        end = at + 8 + length
        if not kind or end + 4 > len(png):
            raise _BadImage(f"is a PNG cut off after {len(png)} bytes; send it again")
        if zlib.crc32(png[at + 4 : end]) != int.from_bytes(png[end : end + 4], "big"):
            raise _BadImage(f"has a chunk {_ascii(kind)} with a wrong checksum; send it again")
        if kind == b"IEND":
            return
        yield kind, png[at + 8 : end]
        at = end + 4


def _ascii(kind: bytes) -> str:
    return ascii(kind)[2:-1]


def _size(kind: bytes, header: bytes, side: Size | None) -> tuple[int, int]:
    """Return the height and width in a PNG's first chunk; _BadImage for any other pixel format."""
    if kind != b"IHDR" or len(header) != _HEADER.size:
        raise _BadImage(f"begins with a chunk {_ascii(kind)}; expected IHDR of 13 bytes")
    width, height, depth, colour, *methods = _HEADER.unpack(header)
    if depth != _DEPTH or colour != _GREYSCALE:
        raise _BadImage(
            f"is a PNG of {depth} bits, {_COLOURS.get(colour, f'colour type {colour}')}; expected "
            "8 bits, greyscale"
        )
    if methods != [0, 0, 0]:
        raise _BadImage(
            f"has the compression, filter and interlace methods {methods}; expected 0 for each"
        )
    if not (0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE):
        raise _BadImage(f"is {height} x {width} pixels; expected 1 to {MAX_SIDE} a side")
    if side not in {None, (height, width)}:
        raise _BadImage(
            f"is {height} x {width} pixels; expected {' x '.join(map(str, side or ()))}, as the "
            "images before it"
        )
    return height, width


def _unfiltered(lines: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Undo the row filters of uint8 (N, height, 1 + width): https://www.w3.org/TR/png/#9Filters.

    Returns uint8 (N, height, width).
    """
    # Each filter needs the finished row above, so rows go one by one, each for all images at once.
    # `Sub` is a running sum; `Average` and `Paeth` also need the finished pixel to the left, and go
    # column by column. Sums are modulo 256, as uint8 counts by itself.
    filters = lines[:, :, 0]  # (N, height)
    pixels = lines[:, :, 1:].copy()  # (N, height, width)
    above = np.zeros_like(pixels[:, 0])  # (N, width); the row above the first is black
    for y in range(pixels.shape[1]):
        row = pixels[:, y]  # (N, width), a view: writing to it finishes the row in `pixels`
        kinds = filters[:, y]  # (N,)
        for kind in np.unique(kinds):
            chosen = np.flatnonzero(kinds == kind)
            if kind == _SUB:
                row[chosen] = np.cumsum(row[chosen], axis=1, dtype=np.uint8)
            elif kind == _UP:
                row[chosen] += above[chosen]
            elif kind in {_AVERAGE, _PAETH}:
                undo = _undo_average if kind == _AVERAGE else _undo_paeth
                # (chosen, width) -> (width, chosen): row[x] is then a column of all images.
                # 16 bits hold the sums and differences of neighbours.
                row[chosen] = undo(
                    row[chosen].T.astype(np.int16), above[chosen].T.astype(np.int16)
                ).T
        above = row
    return pixels


def _undo_average(row: NDArray[np.int16], above: NDArray[np.int16]) -> NDArray[np.int16]:
    """Add the mean of the pixels to the left and above to each pixel: int16 (width, N)."""
    left = np.zeros_like(row[0])  # (N,)
    for x in range(len(row)):
        row[x] = left = (row[x] + ((left + above[x]) >> 1)) & 255
    return row


def _undo_paeth(row: NDArray[np.int16], above: NDArray[np.int16]) -> NDArray[np.int16]:
    """Add to each pixel the neighbour (left, up, corner) nearest to left + up - corner.

    Takes and returns int16 (width, N). Ties go to left, then up.
    """
    left = corner = np.zeros_like(row[0])  # (N,)
    for x in range(len(row)):
        up = above[x]
        # |p - left|, |p - up| and |p - corner| for the prediction p = left + up - corner.
        by_left = np.abs(up - corner)
        by_up = np.abs(left - corner)
        by_corner = np.abs(left + up - 2 * corner)
        nearest = np.where(by_up <= by_corner, up, corner)
        nearest = np.where((by_left <= by_up) & (by_left <= by_corner), left, nearest)
        row[x] = left = (row[x] + nearest) & 255
        corner = up
    return row
