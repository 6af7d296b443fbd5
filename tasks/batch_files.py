"""Read the files of an arriving batch: from bytes that anybody may have sent to plain arrays.

A batch is a flat folder with an IDX pair (gzipped or not) or Parquet files in the Hugging Face
image layout, `image` a struct whose `bytes` are a PNG and `label` an integer. What is promised is
checked before anything is unpacked, and memory is taken for what was allowed, not for what was
sent. Nothing here judges digits: images of any look and labels of any value are for the
expectations.

PNGs are decoded here and not by a library: images of one size and one pixel format need 60 lines,
are undone thousands at a time (10 to 20 times faster than Pillow's one by one), and no C code
meets what was sent but zlib and Arrow.
"""

import io
import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mnist_cnn.digits import SIDE, Digits, parse_idx

if TYPE_CHECKING:
    import pyarrow.parquet as pq

MAX_IMAGES = 500_000
"""Images in a batch: eight times MNIST, 392 MB of pixels. More come as several batches."""

MAX_SIDE = 64
"""Height and width, pixels: enough for an expectation to say that 32 x 32 is no MNIST image."""

MAX_PIXELS = MAX_IMAGES * SIDE * SIDE
"""Bytes of all images of a batch in memory."""

MAX_FILE_BYTES = 400 << 20
"""Size of one file: `MAX_PIXELS` in an IDX file that is not packed, and its header."""

MAX_BATCH_BYTES = 512 << 20
"""Size of all files of a batch, which are in memory while it is read."""

MAX_FILES = 200
"""Files in a batch: the Hugging Face layout cuts a split into tens of shards at most."""

MAX_NAME = 200
"""Characters in a file's name: less than the 255 bytes that file systems take."""

MAX_PNG_BYTES = 16 << 10
"""Size of one PNG: four times the pixels of the largest image, for texts and profiles beside it."""

MAX_PAGE_BYTES = 64 << 20
"""Size of an unpacked Parquet page: one page for 122,880 images, DuckDB's row group, takes 40."""

_MAX_FOOTER_BYTES = 2 << 20  # 1.5 kB for a row group of 1,000 images makes 0.75 MB for MAX_IMAGES
_MAX_THRIFT_ITEMS = 10_000  # row groups or columns in a footer
_MAX_PAGES = 100_000  # pages of a column in a file
_ROWS = 4096  # images decoded at a time: 3.2 MB, and the vectors of the row filters fit in a cache
_MAX_PAGE_HEADER = 64 << 10  # bytes; some writers put the smallest and largest value into it
_MARKER = "_SUCCESS"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_IDX_NAME = re.compile(r"(.*)(images[.-]idx3|labels[.-]idx1)-ubyte(\.gz)?")
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOURS = {
    0: "greyscale",
    2: "colour",
    3: "palette",
    4: "greyscale with alpha",
    6: "colour with alpha",
}
_SUB, _UP, _AVERAGE, _PAETH = 1, 2, 3, 4
_BOOLEANS, _BYTE, _INTEGERS, _BYTES, _LIST, _STRUCT = {1, 2}, 3, {4, 5, 6}, 8, 9, 12  # Thrift's

_MAX_FIELD, _MAX_DEPTH = 1000, 8  # Parquet numbers to 20 and nests to 5
# Fields of https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift.
_NUM_ROWS, _ROW_GROUPS = (3, 6), (4, _LIST)
_COLUMN_CHUNKS, _COLUMN = (1, _LIST), (3, _STRUCT)
_PACKED, _DATA_AT, _DICTIONARY_AT = (7, 6), (9, 6), (11, 6)
_PAGE_UNPACKED, _PAGE_PACKED, _PAGE_VALUES = (2, 5), (3, 5), (1, 5)
_Struct = dict[tuple[int, int], Any]


class BadBatch(ValueError):
    """What a producer sent cannot be read.

    The sentence says which file, what was got and what was expected.
    """


class _NotThrift(ValueError):
    """What should be a page header holds what no page header holds."""


class _BadImage(ValueError):
    """One PNG cannot be read; the sentence goes on after "the first, in row 7,"."""


@dataclass(frozen=True, eq=False)
class RawBatch:
    """What the files of a batch hold: readable, of one size, and not judged yet.

    `images` is uint8 (N, height, width) with N of at least 1 and sides of 1 to `MAX_SIDE`;
    `labels` is int64 (N,), of any value.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)


def check_names(files: Mapping[str, int]) -> None:
    """Refuse a batch by what a listing says of it, before anything is fetched.

    `files` maps names, relative to the batch's folder, to sizes in bytes. Raises BadBatch unless
    they are one IDX pair or some Parquet files, of plain names and bounded sizes, and nothing else
    but the marker `_SUCCESS`, which is ignored.
    """
    if len(files) > MAX_FILES:
        raise BadBatch(f"the batch has {len(files)} files; expected at most {MAX_FILES}")
    for name in files:
        if len(name) > MAX_NAME or not _NAME.fullmatch(name):
            raise BadBatch(
                f"{name[:MAX_NAME]!a} is no plain file name; expected at most {MAX_NAME} "
                "letters, digits, '.', '_' and '-', no '.' at the start and no folders"
            )
    sizes = {name: size for name, size in files.items() if name != _MARKER}
    if not sizes:
        raise BadBatch("the batch has no file; expected an IDX pair or Parquet files")
    _check_formats(list(sizes))
    for name, size in sizes.items():
        if size == 0:
            raise BadBatch(f"{name} is empty; expected data: send it again")
        if size > MAX_FILE_BYTES:
            raise BadBatch(f"{name} has {size} bytes; expected at most {MAX_FILE_BYTES}")
    if sum(sizes.values()) > MAX_BATCH_BYTES:
        raise BadBatch(
            f"the batch has {sum(sizes.values())} bytes; expected at most {MAX_BATCH_BYTES}: "
            "send it as several"
        )


def _check_formats(names: list[str]) -> None:
    """Refuse all but one IDX pair or some Parquet files."""
    pairs = {name: match for name in names if (match := _IDX_NAME.fullmatch(name))}
    foreign = [name for name in names if name not in pairs and not name.endswith(".parquet")]
    if foreign:
        raise BadBatch(
            f"{foreign[0]} is neither *images-idx3-ubyte[.gz], *labels-idx1-ubyte[.gz] nor "
            "*.parquet; expected nothing else in a batch: it was not opened"
        )
    if pairs and len(pairs) < len(names):
        raise BadBatch(f"the batch mixes IDX and Parquet ({_few(names)}); expected one of them")
    kinds = sorted(match[2][:6] for match in pairs.values())
    if pairs and (kinds != ["images", "labels"] or len({m[1] for m in pairs.values()}) > 1):
        raise BadBatch(
            f"the batch has the IDX files {_few(names)}; expected one pair, X-images-idx3-ubyte "
            "and X-labels-idx1-ubyte: send other pairs as batches of their own"
        )


def parse_batch(files: Mapping[str, bytes]) -> RawBatch:
    """Return images and labels of a batch, in the order of its file names.

    `files` maps names, relative to the batch's folder, to contents. Raises BadBatch, and nothing
    else, whatever they hold.
    """
    check_names({name: len(content) for name, content in files.items()})
    names = sorted(name for name in files if name != _MARKER)
    if names[0].endswith(".parquet"):
        return _parse_parquet({name: files[name] for name in names})
    labels, images = sorted(names, key=lambda name: "images" in _IDX_NAME.fullmatch(name)[2])  # type: ignore[index] # check_names matched it
    return _parse_pair(images, files[images], labels, files[labels])


def write_parquet(digits: Digits) -> bytes:
    """Return digits as producers send them: Parquet in the Hugging Face layout, PNGs by Pillow."""
    import pyarrow as pa  # noqa: PLC0415 - 0.2 s, and only for what is Parquet
    import pyarrow.parquet as pq  # noqa: PLC0415
    from PIL import Image  # noqa: PLC0415

    pngs = []
    for pixels in digits.images:
        Image.fromarray(pixels).save(png := io.BytesIO(), "png")
        pngs.append(png.getvalue())
    paths = [f"{row}.png" for row in range(len(pngs))]
    image = pa.StructArray.from_arrays(
        [pa.array(pngs, pa.binary()), pa.array(paths, pa.string())], ["bytes", "path"]
    )
    content = io.BytesIO()
    pq.write_table(pa.table({"image": image, "label": digits.labels}), content)
    return content.getvalue()


def _few(names: list[str]) -> str:
    shown = sorted(names)[:4]
    return ", ".join(shown) + (f" and {len(names) - 4} more" if len(names) > len(shown) else "")


def _parse_pair(images: str, pixels: bytes, labels: str, digits: bytes) -> RawBatch:
    """Parse the labels first: they are small, and say how many images there may be."""
    label = _parse_idx(labels, digits, 1, MAX_IMAGES)
    image = _parse_idx(images, pixels, 3, MAX_PIXELS)
    if len(image) != len(label):
        raise BadBatch(
            f"{images} holds {len(image)} images but {labels} holds {len(label)} labels; "
            "expected one label for each image"
        )
    if min(image.shape) < 1 or max(image.shape[1:]) > MAX_SIDE:
        raise BadBatch(
            f"{images} holds {' x '.join(map(str, image.shape))} pixels; expected images of at "
            f"least 1 and at most {MAX_SIDE} pixels a side, at least one of them"
        )
    return RawBatch(image, label.astype(np.int64))


def _parse_idx(name: str, content: bytes, dimensions: int, limit: int) -> NDArray[np.uint8]:
    try:
        array = parse_idx(content, name, limit)
    except ValueError as error:
        raise BadBatch(str(error)) from error
    if array.ndim != dimensions:
        raise BadBatch(
            f"{name} has the magic {0x800 + array.ndim:#010x} of {array.ndim} dimensions; expected "
            f"{0x800 + dimensions:#010x}, as its name says: were images and labels exchanged?"
        )
    return array


def _parse_parquet(files: Mapping[str, bytes]) -> RawBatch:
    """Open all files, so that their rows are known, then decode a few thousand rows at a time."""
    opened, total = {}, 0
    for name, content in files.items():
        opened[name] = _open_parquet(name, content)
        rows = opened[name].metadata.num_rows
        total += rows
        if rows < 1 or total > MAX_IMAGES:
            raise BadBatch(
                f"{name} promises {rows} rows, {total} with the files before it; expected at most "
                f"{MAX_IMAGES} in all"
            )
    side: _Side = None
    images, labels = np.empty((total, 0, 0), np.uint8), np.empty(total, np.int64)
    at = 0
    for name, file in opened.items():
        start, bad, first = at, 0, ""
        for pngs, labels[at : at + len(pngs)] in _rows(name, file):
            side, decoded, refused = _decode(pngs, side)
            if refused and not bad:
                row, reason = next(iter(refused.items()))
                first = f"the first, in row {at - start + row}, {reason}"
            bad += len(refused)
            if not bad:
                if not images.size:
                    images = _room(name, total, *decoded.shape[1:])
                images[at : at + len(pngs)] = decoded
            at += len(pngs)
        if bad:
            raise BadBatch(f"{name}: {bad} of {at - start} images cannot be read; {first}")
    return RawBatch(images, labels)


def _room(name: str, count: int, height: int, width: int) -> NDArray[np.uint8]:
    if count * height * width > MAX_PIXELS:
        raise BadBatch(
            f"{name} begins {count} images of {height} x {width}, {count * height * width} pixels; "
            f"expected at most {MAX_PIXELS}: send them as several batches"
        )
    return np.empty((count, height, width), np.uint8)


def _printable(foreign: object) -> str:
    """Return what holds a producer's words so that it can stand in a sentence of ours."""
    return ascii(str(foreign))[1:-1][:200]


@contextmanager
def _arrow(name: str) -> Iterator[None]:
    """Turn what Arrow raises into a sentence of ours."""
    import pyarrow as pa  # noqa: PLC0415 - 0.2 s, and only for what is Parquet

    try:
        yield
    except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
        raise BadBatch(
            f"{name} cannot be read as Parquet ({_printable(error)}); expected a whole "
            "file, plain or dictionary encoded, not encrypted: write it again"
        ) from error


def _open_parquet(name: str, content: bytes) -> "pq.ParquetFile":
    """Open a file whose footer promises the two columns and no more than there may be."""
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.parquet as pq  # noqa: PLC0415

    footer = _footer(name, content)
    if footer.get(_NUM_ROWS) == 0:
        raise BadBatch(f"{name} has 0 rows; expected at least one image in each file")
    try:
        unpacked = _unpacked_bytes(name, content, footer)
    except (IndexError, KeyError, _NotThrift) as error:
        raise BadBatch(
            f"{name} has a corrupt footer or page header; expected the sizes and places of its "
            "pages: write it again"
        ) from error
    if unpacked > MAX_BATCH_BYTES:
        raise BadBatch(
            f"{name} unpacks to {unpacked} bytes; expected at most {MAX_BATCH_BYTES}: it was not "
            "unpacked"
        )
    options: dict[str, Any] = {
        "pre_buffer": False,
        "thrift_string_size_limit": _MAX_FOOTER_BYTES,
        "thrift_container_size_limit": _MAX_THRIFT_ITEMS,
    }
    with _arrow(name):
        file = pq.ParquetFile(pa.BufferReader(content), **options)
        schema = file.schema_arrow
    _check_columns(name, schema)
    with _arrow(name):
        # As a dictionary, a value that a million rows repeat is one value in memory, not a million.
        options |= {"metadata": file.metadata, "read_dictionary": ["image.bytes"]}
        return pq.ParquetFile(pa.BufferReader(content), **options)


def _check_columns(name: str, schema: Any) -> None:
    import pyarrow as pa  # noqa: PLC0415

    for column in ("image", "label"):
        found = len(schema.get_all_field_indices(column))
        if found != 1:
            raise BadBatch(
                f"{name} has {found} columns {column!r} among {schema.names[:10]!a}; expected "
                "one 'image' (struct of bytes and path) and one 'label' (integer)"
            )
    image, label = schema.field("image").type, schema.field("label").type
    bytes_at = image.get_all_field_indices("bytes") if pa.types.is_struct(image) else []
    held = image.field(bytes_at[0]).type if len(bytes_at) == 1 else image
    if len(bytes_at) != 1 or not (pa.types.is_binary(held) or pa.types.is_large_binary(held)):
        raise BadBatch(
            f"{name} has images of type {_printable(image)}; expected struct<bytes: binary, "
            "path: string> with a PNG in bytes"
        )
    if not pa.types.is_integer(label):
        raise BadBatch(f"{name} has labels of type {_printable(label)}; expected integers, 0 to 9")


def _footer(name: str, content: bytes) -> _Struct:
    """Return the footer of a Parquet file, checked for size and form before Arrow sees it."""
    size = int.from_bytes(content[-8:-4], "little")
    if content[:4] != b"PAR1" or content[-4:] != b"PAR1" or size + 12 > len(content):
        raise BadBatch(
            f"{name} is no whole Parquet file: its {len(content)} bytes do not begin and end with "
            "PAR1 and hold the footer that they promise; send it again"
        )
    if size > _MAX_FOOTER_BYTES:
        raise BadBatch(
            f"{name} has a footer of {size} bytes; expected at most {_MAX_FOOTER_BYTES}: write "
            "row groups of 1,000 rows or more and leave other columns away"
        )
    try:
        return _Thrift(content[-8 - size : -8]).struct()
    except (IndexError, _NotThrift) as error:
        raise BadBatch(f"{name} has a corrupt footer of {size} bytes; write it again") from error


def _unpacked_bytes(name: str, content: bytes, footer: _Struct) -> int:
    """Return what all pages unpack to, by the header of each.

    The footer says it too, but Arrow takes memory for what the page says, and a bomb's footer lies.
    Places are read from the footer by our own hand: Arrow 25 ends the process, with no exception,
    if asked from Python for the metadata of a column whose size statistics are corrupt.
    """
    total, pages = 0, 0
    groups = _structs(footer[_ROW_GROUPS])
    for chunk in (chunk for group in groups for chunk in _structs(group[_COLUMN_CHUNKS])):
        column = chunk[_COLUMN]
        at = min(column[_DATA_AT], column.get(_DICTIONARY_AT) or column[_DATA_AT])
        end = at + column[_PACKED]
        if not 0 < at <= end <= len(content):
            raise BadBatch(
                f"{name} promises pages in its bytes {at} to {end}; expected them within "
                f"{len(content)}: it is corrupt, write it again"
            )
        while at < end:
            header = _Thrift(content[at : at + _MAX_PAGE_HEADER])
            sizes = header.struct()
            unpacked, packed = sizes[_PAGE_UNPACKED], sizes[_PAGE_PACKED]
            at += header.at + packed
            total += unpacked
            pages += 1
            kinds = (part for part in sizes.values() if isinstance(part, dict))
            values = max((part[_PAGE_VALUES] for part in kinds), default=-1)
            if min(unpacked, packed, values) < 0:
                raise _NotThrift
            if unpacked > MAX_PAGE_BYTES or values > MAX_IMAGES or pages > _MAX_PAGES:
                raise BadBatch(
                    f"{name} unpacks its page {pages} to {unpacked} bytes of {values} values; "
                    f"expected at most {MAX_PAGE_BYTES} of {MAX_IMAGES} in at most {_MAX_PAGES} "
                    "pages: it was not unpacked"
                )
    return total


def _structs(values: list[Any]) -> list[_Struct]:
    if not all(isinstance(value, dict) for value in values):
        raise _NotThrift
    return values


class _Thrift:
    """Read Thrift's compact protocol: what Parquet's footer and page headers use of it.

    A struct is a dict of its values by number and type of their field; of bytes only the length is
    kept. Raises IndexError where the content ends, and _NotThrift for what a writer never writes,
    such as a field that is there twice: what Arrow would make of it is not ours to guess.
    """

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.at = 0

    def struct(self, depth: int = 0) -> _Struct:
        """Return the struct that begins here, and stand behind it."""
        values: _Struct = {}
        number = 0
        while head := self._byte():
            kind = head & 15
            number = number + (head >> 4) if head >> 4 else self._integer()
            if (number, kind) in values or not 0 < number <= _MAX_FIELD or depth > _MAX_DEPTH:
                raise _NotThrift
            values[number, kind] = None if kind in _BOOLEANS else self._value(kind, depth)
        return values

    def _value(self, kind: int, depth: int) -> Any:
        if kind in _INTEGERS:
            return self._integer()
        if kind == _BYTE:
            return self._byte()
        if kind == _BYTES:
            length = self._varint()
            self.at += length
            return length
        if kind == _LIST:
            head = self._byte()
            count = head >> 4 if head >> 4 < 15 else self._varint()  # noqa: PLR2004 - 15: it follows
            if count > _MAX_THRIFT_ITEMS:
                raise _NotThrift
            return [self._value(head & 15, depth) for _ in range(count)]
        if kind == _STRUCT:
            return self.struct(depth + 1)
        raise _NotThrift

    def _byte(self) -> int:
        self.at += 1
        return self._content[self.at - 1]

    def _varint(self) -> int:
        value = shift = 0
        while (byte := self._byte()) & 128:
            value |= (byte & 127) << shift
            shift += 7
            if shift > 63:  # noqa: PLR2004 - bits of the largest integer
                raise _NotThrift
        return value | byte << shift

    def _integer(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)


def _rows(name: str, file: "pq.ParquetFile") -> Iterator[tuple[list[bytes | None], Any]]:
    """Yield PNGs and labels of a few thousand rows at a time; BadBatch if a label is null."""
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.compute as pc  # noqa: PLC0415

    promised, seen, nulls, first_null = file.metadata.num_rows, 0, 0, 0
    pngs: list[bytes | None] = []
    labels: list[NDArray[np.int64]] = []
    with _arrow(name):
        for part in _record_batches(file):
            label = part["label"]
            if label.null_count and not nulls:
                first_null = seen + pc.index(label.is_null(), True).as_py()
            nulls += label.null_count
            (png,) = part["image"].flatten()  # with the nulls of the struct
            longest = pc.max(pc.binary_length(png.dictionary).take(png.indices)).as_py() or 0
            if longest > MAX_PNG_BYTES:
                raise BadBatch(
                    f"{name} has an image of {longest} bytes in rows {seen} to "
                    f"{seen + len(part) - 1}; expected PNGs of at most {MAX_PNG_BYTES}"
                )
            seen += len(part)
            if seen > promised:
                break
            pngs += png.dictionary_decode().to_pylist()
            labels.append(label.fill_null(0).cast(pa.int64()).to_numpy())
            if len(pngs) >= _ROWS:
                yield pngs, np.concatenate(labels)
                pngs, labels = [], []
    if seen != promised:
        more = "more" if seen > promised else str(seen)
        raise BadBatch(f"{name} promises {promised} rows but holds {more}; write it again")
    if pngs:
        yield pngs, np.concatenate(labels)
    if nulls:
        raise BadBatch(
            f"{name}: {nulls} of {seen} labels are null, the first in row {first_null}; expected "
            "an integer in each row"
        )


def _record_batches(file: "pq.ParquetFile") -> Iterator[Any]:
    """Yield a few thousand rows at a time; none spans row groups, whose dictionaries differ."""
    for group in range(file.metadata.num_row_groups):
        yield from file.iter_batches(_ROWS, [group], ["image.bytes", "label"], use_threads=False)


_Side = tuple[int, int] | None  # height and width of the images, once the first was seen


def _decode(
    pngs: list[bytes | None], side: _Side
) -> tuple[_Side, NDArray[np.uint8], dict[int, str]]:
    """Return the images' size, uint8 (N, height, width), and what is wrong with which row."""
    lines, refused = [], {}
    for row, png in enumerate(pngs):
        try:
            side, line = _filtered_lines(png, side)
            lines.append(line)
        except _BadImage as error:
            refused[row] = str(error)
    if refused or side is None:
        return side, np.empty((0, 0, 0), np.uint8), refused
    height, width = side
    joined = np.frombuffer(b"".join(lines), np.uint8).reshape(-1, height, 1 + width)
    foreign = (joined[:, :, 0] > _PAETH).any(axis=1)
    refused = {int(row): "has a row filter beyond the five" for row in np.flatnonzero(foreign)}
    return side, joined[:, :, 1:] if refused else _unfiltered(joined), refused


def _filtered_lines(png: bytes | None, side: _Side) -> tuple[tuple[int, int], bytes]:
    """Return size and inflated lines, a filter's number before each, of a PNG that may be read.

    Signature, sizes, pixel format and checksums come first; nothing is unpacked beyond the size.
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


def _size(kind: bytes, header: bytes, side: _Side) -> tuple[int, int]:
    """Return height and width that a PNG's first chunk declares, if they may be read."""
    if kind != b"IHDR" or len(header) != 13:  # noqa: PLR2004
        raise _BadImage(f"begins with a chunk {_ascii(kind)}; expected IHDR of 13 bytes")
    width, height, depth, colour, *methods = struct.unpack(">IIBBBBB", header)
    if depth != 8 or colour != 0:  # noqa: PLR2004
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

    Row by row of all images at once: each filter needs the finished row above. `Sub` is a running
    sum; `Average` and `Paeth` also need the finished pixel to the left, and go column by column.
    """
    filters, pixels = lines[:, :, 0], lines[:, :, 1:].copy()
    above = np.zeros_like(pixels[:, 0])
    for y in range(pixels.shape[1]):
        row, kinds = pixels[:, y], filters[:, y]
        for kind in np.unique(kinds):
            chosen = np.flatnonzero(kinds == kind)
            if kind == _SUB:
                row[chosen] = np.cumsum(row[chosen], axis=1, dtype=np.uint8)
            elif kind == _UP:
                row[chosen] += above[chosen]
            elif kind in {_AVERAGE, _PAETH}:
                undo = _undo_average if kind == _AVERAGE else _undo_paeth
                row[chosen] = undo(
                    row[chosen].T.astype(np.int16), above[chosen].T.astype(np.int16)
                ).T
        above = row
    return pixels


def _undo_average(row: NDArray[np.int16], above: NDArray[np.int16]) -> NDArray[np.int16]:
    left = np.zeros_like(row[0])
    for x in range(len(row)):
        row[x] = left = (row[x] + ((left + above[x]) >> 1)) & 255
    return row


def _undo_paeth(row: NDArray[np.int16], above: NDArray[np.int16]) -> NDArray[np.int16]:
    """Add to each pixel that neighbour (left, above, corner) which is nearest to their plane."""
    left = corner = np.zeros_like(row[0])
    for x in range(len(row)):
        up = above[x]
        by_left, by_up = np.abs(up - corner), np.abs(left - corner)
        by_corner = np.abs(left + up - 2 * corner)
        nearest = np.where(by_up <= by_corner, up, corner)
        nearest = np.where((by_left <= by_up) & (by_left <= by_corner), left, nearest)
        row[x] = left = (row[x] + nearest) & 255
        corner = up
    return row
