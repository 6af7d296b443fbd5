"""Decode untrusted small greyscale PNGs: what they promise is checked here, Pillow decodes them.

The checks are stricter than Pillow, which skips a misplaced palette, unknown chunks, the checksums
of pixels, and pixels beyond the last. Chunks and formats follow https://www.w3.org/TR/png/.
"""

import io
import struct
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tasks.arrivals.batch_files import MAX_SIDE

Size = tuple[int, int]
"""Height and width, pixels."""

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
    pixels: list[bytes] = []
    refused: dict[int, str] = {}
    for row, png in enumerate(pngs):
        try:
            side, plain = _checked(png, side)
            pixels.append(_pixels(plain))
        except _BadImage as error:
            refused[row] = str(error)
    if refused or side is None:
        return side, np.empty((0, 0, 0), np.uint8), refused
    return side, np.frombuffer(b"".join(pixels), np.uint8).reshape(-1, *side), {}


def _checked(png: bytes | None, side: Size | None) -> tuple[Size, bytes]:
    """Return a PNG's size, and the PNG without the chunks that its pixels do not need.

    Signature, checksums, pixel format and sizes are checked first. No more bytes are unpacked than
    the size needs, and one, which shows that there are more.
    """
    if png is None:
        raise _BadImage("is null; expected a PNG")
    if png[:8] != _SIGNATURE:
        raise _BadImage(f"begins with {png[:8].hex()!r}; expected a PNG's {_SIGNATURE.hex()!r}")
    chunks = _chunks(png)
    header = next(chunks)
    height, width = size = _size(header[4:8], header[8:-4], side)
    pixels: list[bytes] = []
    for chunk in chunks:
        kind = chunk[4:8]
        if kind in {b"IDAT", b"IEND"}:
            pixels.append(chunk)
        elif kind == b"tRNS" or not kind[0] & 0x20:  # a capital: it may not be skipped
            raise _BadImage(f"has a chunk {_ascii(kind)}; expected opaque greyscale, no palette")
    promised = height * (1 + width)  # a line begins with the number of its filter
    inflate = zlib.decompressobj()
    try:
        lines = inflate.decompress(b"".join(idat[8:-4] for idat in pixels[:-1]), promised + 1)
    except zlib.error as error:
        raise _BadImage(f"has corrupt pixels ({error}); send it again") from error
    if len(lines) != promised or not inflate.eof:
        held = f"more than {promised}" if len(lines) > promised else f"{len(lines)}, cut off"
        raise _BadImage(f"promises {promised} bytes of lines but holds {held}; send it again")
    return size, b"".join([_SIGNATURE, header, *pixels])


def _pixels(png: bytes) -> bytes:
    """Return the pixels of a checked PNG, a byte each, row by row."""
    # Its size was checked: Pillow's own limit, for decompression bombs, is never reached.
    try:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            return image.tobytes()
    except OSError as error:  # nothing else is left that Pillow refuses
        raise _BadImage("has a row filter beyond PNG's five") from error


def _chunks(png: bytes) -> Iterator[bytes]:
    """Yield length, type, data and checksum of each chunk up to IEND; the checksum is verified."""
    at = len(_SIGNATURE)
    kind = b""
    while kind != b"IEND":
        # Length and type before the data, a checksum of type and data behind it: 12 bytes at least.
        length, kind = struct.unpack_from(">I4s", png, at) if at + 12 <= len(png) else (0, b"")
        end = at + 12 + length
        if not kind or end > len(png):
            raise _BadImage(f"is a PNG cut off after {len(png)} bytes; send it again")
        if zlib.crc32(png[at + 4 : end - 4]) != int.from_bytes(png[end - 4 : end], "big"):
            raise _BadImage(f"has a chunk {_ascii(kind)} with a wrong checksum; send it again")
        yield png[at:end]
        at = end


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
