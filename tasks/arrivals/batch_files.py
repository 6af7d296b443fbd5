"""Parse the files of an arriving batch: from untrusted bytes to plain arrays.

A batch is a flat folder with an IDX pair (gzipped or not) or Parquet files in the Hugging Face
image layout, `image` a struct whose `bytes` are a PNG and `label` an integer. Declared sizes are
checked before anything is unpacked, and memory is bounded by the limits below, for any input.
Nothing here judges digits: images of any look and labels of any value are left to the expectations.
"""

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mnist_cnn.digits import SIDE, Digits
from mnist_cnn.idx import parse_idx
from tasks.arrivals.parquet_pages import MAX_FOOTER_BYTES, MAX_ITEMS, BadPages, check_pages
from tasks.arrivals.png_images import MAX_PNG_BYTES, MAX_SIDE, Size, decode

if TYPE_CHECKING:
    import pyarrow.parquet as pq

MAX_IMAGES = 500_000
"""Maximum images in a batch: eight times MNIST, 392 MB of pixels. Send more as several batches."""

MAX_PIXELS = MAX_IMAGES * SIDE * SIDE
"""Maximum size of all images of a batch in memory, in bytes: one a pixel."""

MAX_FILE_BYTES = 400 << 20
"""Maximum size of a file, in bytes: `MAX_PIXELS` in an uncompressed IDX file, and its header."""

MAX_BATCH_BYTES = 512 << 20
"""Maximum size of all files of a batch, in bytes; they are in memory while it is parsed."""

MAX_FILES = 200
"""Maximum files in a batch: the Hugging Face layout cuts a split into tens of shards at most."""

MAX_NAME = 200
"""Maximum characters in a file's name: less than the 255 bytes that file systems take."""

_ROWS = 4096  # images decoded at a time: 3.2 MB, and the vectors of the row filters fit in a cache
MARKER = "_SUCCESS"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_IDX_NAME = re.compile(r"(.*)(images[.-]idx3|labels[.-]idx1)-ubyte(\.gz)?")


class BadBatch(ValueError):
    """A batch cannot be read.

    The message names the file, the observed and the expected value; rows count from 0.
    """


@dataclass(frozen=True, eq=False)
class RawBatch:
    """Images and labels of a batch: readable, of one size, and not judged yet.

    `images` is uint8 (N, height, width) with N of at least 1 and sides of 1 to `MAX_SIDE`;
    `labels` is int64 (N,), of any value. The images may be a read-only view of the file.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)


def check_names(files: Mapping[str, int]) -> None:
    """Check a batch by the listing of its files, before any download.

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
    # Names are clean from here on and can stand in a message as they are.
    sizes = {name: size for name, size in files.items() if name != MARKER}
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
    """Raise BadBatch unless the names are one IDX pair or some Parquet files."""
    pairs = {name: match for name in names if (match := _IDX_NAME.fullmatch(name))}
    foreign = [name for name in names if name not in pairs and not name.endswith(".parquet")]
    if foreign:
        raise BadBatch(
            f"{foreign[0]} is neither *images-idx3-ubyte[.gz], *labels-idx1-ubyte[.gz] nor "
            "*.parquet; expected nothing else in a batch: it was not opened"
        )
    if pairs and len(pairs) < len(names):
        raise BadBatch(f"the batch mixes IDX and Parquet ({_few(names)}); expected one of them")
    # The two names of a pair begin alike: the first group of the pattern.
    kinds = sorted(match[2][:6] for match in pairs.values())
    if pairs and (kinds != ["images", "labels"] or len({m[1] for m in pairs.values()}) > 1):
        raise BadBatch(
            f"the batch has the IDX files {_few(names)}; expected one pair, X-images-idx3-ubyte "
            "and X-labels-idx1-ubyte: send other pairs as batches of their own"
        )


def parse_batch(files: Mapping[str, bytes]) -> RawBatch:
    """Return images and labels of a batch, in the order of its file names.

    `files` maps names, relative to the batch's folder, to contents. Raises BadBatch and no other
    error, for any content.
    """
    check_names({name: len(content) for name, content in files.items()})
    names = sorted(name for name in files if name != MARKER)
    if names[0].endswith(".parquet"):
        return _parse_parquet({name: files[name] for name in names})
    # The kind is "images" or "labels"; False sorts before True, so the labels come first.
    labels, images = sorted(names, key=lambda name: "images" in _IDX_NAME.sub(r"\2", name))
    return _parse_pair(images, files[images], labels, files[labels])


def write_parquet(digits: Digits) -> bytes:
    """Return digits as a producer's file: Parquet in the Hugging Face layout, PNGs by Pillow."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

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
    """Parse an IDX pair, given as names and contents."""
    # The labels first: they are small, and too many are refused before the images are unpacked.
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
    """Parse Parquet files in two passes: count the rows of all, then decode a few thousand at once.

    With the total known, images and labels are allocated once.
    """
    opened: dict[str, pq.ParquetFile] = {}
    total = 0
    for name, content in files.items():
        opened[name] = _open_parquet(name, content)
        rows = opened[name].metadata.num_rows
        total += rows
        if rows < 1 or total > MAX_IMAGES:
            raise BadBatch(
                f"{name} promises {rows} rows, {total} with the files before it; expected at most "
                f"{MAX_IMAGES} in all"
            )
    side: Size | None = None  # of the first image that can be read; all others must have it
    images = np.empty((total, 0, 0), np.uint8)  # allocated once the side is known
    labels = np.empty(total, np.int64)  # (N,)
    at = 0
    for name, file in opened.items():
        start = at
        bad = 0
        first = ""
        for pngs, digits in _rows(name, file):
            labels[at : at + len(pngs)] = digits
            side, decoded, refused = decode(pngs, side)
            if refused and not bad:
                row, reason = next(iter(refused.items()))
                first = f"the first, in row {at - start + row}, {reason}"
            bad += len(refused)
            # After a bad image the rest of the file is decoded only to count the bad ones.
            if not bad:
                if not images.size:
                    images = _allocate(name, total, *decoded.shape[1:])
                images[at : at + len(pngs)] = decoded  # (rows, height, width)
            at += len(pngs)
        if bad:
            raise BadBatch(f"{name}: {bad} of {at - start} images cannot be read; {first}")
    return RawBatch(images, labels)


def _allocate(name: str, count: int, height: int, width: int) -> NDArray[np.uint8]:
    """Allocate uint8 (count, height, width); BadBatch if that is more than `MAX_PIXELS`."""
    if count * height * width > MAX_PIXELS:
        raise BadBatch(
            f"{name} begins {count} images of {height} x {width}, {count * height * width} pixels; "
            f"expected at most {MAX_PIXELS}: send them as several batches"
        )
    return np.empty((count, height, width), np.uint8)


def _printable(foreign: object) -> str:
    """Return untrusted text as at most 200 ASCII characters, for use in a message."""
    return ascii(str(foreign))[1:-1][:200]


@contextmanager
def _arrow(name: str) -> Iterator[None]:
    """Raise BadBatch in place of Arrow's errors."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
        raise BadBatch(
            f"{name} cannot be read as Parquet ({_printable(error)}); expected a whole "
            "file, plain or dictionary encoded, not encrypted: write it again"
        ) from error


def _open_parquet(name: str, content: bytes) -> "pq.ParquetFile":
    """Open a Parquet file after checking its pages, sizes and columns; BadBatch if one is wrong."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        check_pages(content, name, MAX_IMAGES, MAX_BATCH_BYTES)
    except BadPages as error:
        raise BadBatch(str(error)) from error
    options: dict[str, Any] = {
        "pre_buffer": False,
        "thrift_string_size_limit": MAX_FOOTER_BYTES,
        "thrift_container_size_limit": MAX_ITEMS,
    }
    with _arrow(name):
        file = pq.ParquetFile(pa.BufferReader(content), **options)
        schema = file.schema_arrow
    _check_columns(name, schema)
    # Opened again, now that `image.bytes` is known to exist.
    with _arrow(name):
        # As a dictionary, a value that a million rows repeat is one value in memory, not a million.
        options |= {"metadata": file.metadata, "read_dictionary": ["image.bytes"]}
        return pq.ParquetFile(pa.BufferReader(content), **options)


def _check_columns(name: str, schema: Any) -> None:
    """Raise BadBatch unless the schema has one `image` with binary `bytes` and one integer `label`.

    Parquet allows the same name twice, so that columns are counted, not looked up.
    """
    import pyarrow as pa

    for column in ("image", "label"):
        found = len(schema.get_all_field_indices(column))
        if found != 1:
            raise BadBatch(
                f"{name} has {found} columns {column!r} among {schema.names[:10]!a}; expected "
                "one 'image' (struct of bytes and path) and one 'label' (integer)"
            )
    image = schema.field("image").type
    label = schema.field("label").type
    bytes_at = image.get_all_field_indices("bytes") if pa.types.is_struct(image) else []
    held = image.field(bytes_at[0]).type if len(bytes_at) == 1 else image
    if len(bytes_at) != 1 or not (pa.types.is_binary(held) or pa.types.is_large_binary(held)):
        raise BadBatch(
            f"{name} has images of type {_printable(image)}; expected struct<bytes: binary, "
            "path: string> with a PNG in bytes"
        )
    if not pa.types.is_integer(label):
        raise BadBatch(f"{name} has labels of type {_printable(label)}; expected integers, 0 to 9")


def _rows(name: str, file: "pq.ParquetFile") -> Iterator[tuple[list[bytes | None], Any]]:
    """Yield PNGs and labels of a few thousand rows at a time.

    Raises BadBatch for a label that is null, a PNG that is too large, or another number of rows
    than the footer states.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    promised = file.metadata.num_rows
    seen = 0
    nulls = 0
    first_null = 0
    pngs: list[bytes | None] = []
    labels: list[NDArray[np.int64]] = []
    with _arrow(name):
        for part in _record_batches(file):
            label = part["label"]
            if label.null_count and not nulls:
                first_null = seen + pc.index(label.is_null(), True).as_py()
            nulls += label.null_count
            (png,) = part["image"].flatten()  # with the nulls of the struct
            # The longest value that a row uses, before any row's bytes become a Python object. The
            # dictionary alone may hold values that no row uses.
            longest = pc.max(pc.binary_length(png.dictionary).take(png.indices)).as_py() or 0
            if longest > MAX_PNG_BYTES:
                raise BadBatch(
                    f"{name} has an image of {longest} bytes in rows {seen} to "
                    f"{seen + len(part) - 1}; expected PNGs of at most {MAX_PNG_BYTES}"
                )
            seen += len(part)
            if seen > promised:  # the arrays have no room for more
                break
            pngs += png.dictionary_decode().to_pylist()
            # A null becomes 0 here and an error at the end, with the number of all nulls.
            labels.append(label.fill_null(0).cast(pa.int64()).to_numpy())
            if len(pngs) >= _ROWS:
                yield pngs, np.concatenate(labels)
                pngs = []
                labels = []
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
