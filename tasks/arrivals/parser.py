"""Parse the files of an arriving batch, in a process of its own.

    python -m tasks.arrivals.parser MEMORY SECONDS < FILES > RESULT

`tasks.arrivals.batch_files` starts it. Whatever an untrusted file does to Arrow, Pillow or zlib
ends at the limits on memory and processor time, and with this process.
"""

import json
import resource
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mnist_cnn.idx import parse_idx
from tasks.arrivals.batch_files import (
    MAX_BATCH_BYTES,
    MAX_IMAGES,
    MAX_PIXELS,
    MAX_SIDE,
    BadBatch,
    RawBatch,
)
from tasks.arrivals.png_images import MAX_PNG_BYTES, Size, decode

_MAX_FOOTER_BYTES = 2 << 20  # 1.5 kB a row group of 1,000 images makes 0.75 MB for 500,000
_MAX_ITEMS = 10_000  # of a list in the footer: row groups, or columns of one
_ROWS = 4096  # images decoded at a time: 3.2 MB
_GRACE = 5  # seconds of a processor from SIGXCPU, at the soft limit, to SIGKILL, at the hard one


def main(memory: int, seconds: int) -> None:
    """Parse the files on standard input; write the reason against them, or images and labels.

    The input is the files' sizes by name, as a line of JSON, and their contents. The output is the
    reason as a line, which is empty if there is none, and then the arrays as NumPy saves them.
    """
    # SIGKILL would read as if the machine had ended this process, and not these files.
    _limit(resource.RLIMIT_CPU, seconds, _GRACE)
    _limit(resource.RLIMIT_CORE, 0)
    # macOS has no limit on a process's memory: there the checks of declared sizes stand alone.
    if sys.platform != "darwin":
        _limit(resource.RLIMIT_AS, memory)
    sizes = json.loads(sys.stdin.buffer.readline())
    result = sys.stdout.buffer
    try:
        batch = parse({name: sys.stdin.buffer.read(size) for name, size in sizes.items()})
    except BadBatch as error:
        result.write(f"{error}\n".encode())
    except MemoryError:
        result.write(
            f"the batch takes more than {memory >> 20} MiB of memory to parse; expected less: "
            "write it again, or send it as several batches\n".encode()
        )
    except Exception as error:  # noqa: BLE001 - whatever the libraries raise, the files are at fault
        reason = _printable(f"{type(error).__name__}: {error}")
        result.write(
            f"the files cannot be read ({reason}); expected plain IDX or Parquet files: write them "
            "again\n".encode()
        )
    else:
        result.write(b"\n")
        np.save(result, batch.images, allow_pickle=False)
        np.save(result, batch.labels, allow_pickle=False)


def _limit(kind: int, most: int, grace: int = 0) -> None:
    """Limit a resource of this process, where it is not limited further already.

    The hard limit is above the soft one by `grace`, also where it was lower before.
    """
    hard = resource.getrlimit(kind)[1]
    hard = most + grace if hard == resource.RLIM_INFINITY else min(most + grace, hard)
    resource.setrlimit(kind, (max(hard - grace, min(hard, 1)), hard))


def parse(files: Mapping[str, bytes]) -> RawBatch:
    """Return images and labels of a batch whose names were checked, in the order of the names."""
    names = sorted(files)
    if names[0].endswith(".parquet"):
        return _parse_parquet({name: files[name] for name in names})
    # False sorts before True, so the labels come first.
    labels, images = sorted(names, key=lambda name: name.removesuffix(".gz").endswith("3-ubyte"))
    return _parse_pair(images, files[images], labels, files[labels])


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
    try:
        yield
    except MemoryError:  # one of Arrow's too, but `main` has the sentence for it
        raise
    except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
        raise BadBatch(
            f"{name} cannot be read as Parquet ({_printable(error)}); expected a whole "
            "file, plain or dictionary encoded, not encrypted: write it again"
        ) from error


def _open_parquet(name: str, content: bytes) -> pq.ParquetFile:
    """Open a Parquet file after checking its sizes and columns; BadBatch if one is wrong."""
    # A file is PAR1, pages, footer, the footer's length in four bytes, PAR1.
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
    options: dict[str, Any] = {
        "pre_buffer": False,
        "thrift_string_size_limit": _MAX_FOOTER_BYTES,
        "thrift_container_size_limit": _MAX_ITEMS,
    }
    try:
        file = pq.ParquetFile(pa.BufferReader(content), **options)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise BadBatch(
            f"{name} has a corrupt footer or page header; expected sizes and places of its pages: "
            "write it again"
        ) from error
    about = file.metadata
    if not about.num_rows:
        raise BadBatch(f"{name} has 0 rows; expected at least one image in each file")
    # Never ask for a column's metadata: Arrow 25 ends the process if its size statistics are wrong.
    unpacked = sum(about.row_group(at).total_byte_size for at in range(about.num_row_groups))
    if unpacked > MAX_BATCH_BYTES:
        raise BadBatch(
            f"{name} unpacks to {unpacked} bytes; expected at most {MAX_BATCH_BYTES}: it was not "
            "unpacked"
        )
    with _arrow(name):
        _check_columns(name, file.schema_arrow)
        # Opened again, now that `image.bytes` is known to exist.
        # As a dictionary, a value that a million rows repeat is one value in memory, not a million.
        options |= {"metadata": about, "read_dictionary": ["image.bytes"]}
        return pq.ParquetFile(pa.BufferReader(content), **options)


def _check_columns(name: str, schema: Any) -> None:
    """Raise BadBatch unless the schema has one `image` with binary `bytes` and one integer `label`.

    Parquet allows the same name twice, so that columns are counted, not looked up.
    """
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
    if "image.bytes" in schema.names:  # Arrow would take it for the field `bytes` of `image`
        raise BadBatch(f"{name} has a column 'image.bytes' beside 'image'; leave it away")
    if not pa.types.is_integer(label):
        raise BadBatch(f"{name} has labels of type {_printable(label)}; expected integers, 0 to 9")


def _rows(name: str, file: pq.ParquetFile) -> Iterator[tuple[list[bytes | None], list[int]]]:
    """Yield PNGs and labels of a few thousand rows at a time.

    Raises BadBatch for a label that is null, a PNG that is too large, or another number of rows
    than the footer states.
    """
    promised = file.metadata.num_rows
    seen = 0
    nulls = 0
    first_null = 0
    pngs: list[bytes | None] = []
    labels: list[int] = []
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
            # In Python, since Arrow's `fill_null` and `to_numpy` take 0.3 s to import pandas.
            labels += [value or 0 for value in label.cast(pa.int64()).to_pylist()]
            if len(pngs) >= _ROWS:
                yield pngs, labels
                pngs = []
                labels = []
    if seen != promised:
        more = "more" if seen > promised else str(seen)
        raise BadBatch(f"{name} promises {promised} rows but holds {more}; write it again")
    if pngs:
        yield pngs, labels
    if nulls:
        raise BadBatch(
            f"{name}: {nulls} of {seen} labels are null, the first in row {first_null}; expected "
            "an integer in each row"
        )


def _record_batches(file: pq.ParquetFile) -> Iterator[Any]:
    """Yield a few thousand rows at a time; none spans row groups, whose dictionaries differ."""
    for group in range(file.metadata.num_row_groups):
        yield from file.iter_batches(_ROWS, [group], ["image.bytes", "label"], use_threads=False)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
