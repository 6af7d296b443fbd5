import gzip
import io
import random
import signal
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mnist_cnn.digits import Digits
from mnist_cnn.idx import write_idx
from mnist_cnn.sample import embedded_sample
from tasks.arrivals.batch_files import (
    MAX_BATCH_BYTES,
    MAX_FILES,
    MAX_IMAGES,
    MAX_NAME,
    BadBatch,
    ParserInterrupted,
    RawBatch,
    check_names,
    parse_batch,
    write_parquet,
)
from tests.tasks.arrivals.forked import parsers

Files = dict[str, bytes]
RUN = subprocess.run

DIGITS = embedded_sample()[0].part(0, 20)
IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
MIB = 1 << 20


def idx_pair(images: bytes | None = None, labels: bytes | None = None) -> Files:
    return {
        IMAGES: write_idx(DIGITS.images) if images is None else images,
        LABELS: write_idx(DIGITS.labels.astype(np.uint8)) if labels is None else labels,
    }


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    lines: bytes = bytes(28 * 29),
    size: tuple[int, int] = (28, 28),
    pixel: tuple[int, int, int] = (8, 0, 0),
    extra: bytes = b"",
) -> bytes:
    """Put a PNG together from filtered lines; `pixel` is bits, colour type, interlace method."""
    bits, colour, interlace = pixel
    head = struct.pack(">IIBBBBB", *size, bits, colour, 0, 0, interlace)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + extra
        + chunk(b"IDAT", zlib.compress(lines))
        + chunk(b"IEND", b"")
    )


def by_pillow(pixels: np.ndarray, mode: str = "L") -> bytes:
    Image.fromarray(pixels).convert(mode).save(content := io.BytesIO(), "png")
    return content.getvalue()


def parquet(
    pngs: Sequence[bytes | None], labels: pa.Array | None = None, **options: object
) -> Files:
    values = pa.array(pngs, pa.binary())
    image = pa.StructArray.from_arrays(
        [values, pa.nulls(len(pngs), pa.string())], ["bytes", "path"]
    )
    label = pa.array([5] * len(pngs)) if labels is None else labels
    return {"train.parquet": written(pa.table({"image": image, "label": label}), **options)}


def written(table: pa.Table, **options: object) -> bytes:
    pq.write_table(table, content := io.BytesIO(), **options)
    return content.getvalue()


def gzipped_zeros(head: bytes, total: int) -> bytes:
    """Return a gzip file of `head` and zeros; blocks of 16 MiB are packed once and repeated."""
    deflate = zlib.compressobj(9, wbits=-15)
    first = deflate.compress(head) + deflate.flush(zlib.Z_FULL_FLUSH)
    block = deflate.compress(bytes(16 * MIB)) + deflate.flush(zlib.Z_FULL_FLUSH)
    return (
        gzip.compress(b"")[:10] + first + block * (total // (16 * MIB)) + deflate.flush() + bytes(8)
    )


@contextmanager
def at_most(limit: int) -> Iterator[None]:
    """Fail if Python, NumPy and zlib together, or Arrow, take more than `limit` bytes."""
    arrow = pa.default_memory_pool()
    before = max(arrow.max_memory(), 0)
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
        assert arrow.max_memory() - before < limit
    finally:
        tracemalloc.stop()


def refused(files: Files, *parts: str) -> None:
    with pytest.raises(BadBatch) as error:
        parse_batch(files)
    for part in parts:
        assert part in str(error.value)


# What is read


@pytest.mark.parametrize("form", ["idx", "parquet"])
def test_a_batch_is_read_by_a_process_that_starts_as_in_earnest(
    monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setattr("tasks.arrivals.batch_files.subprocess.run", RUN)
    batch = parse_batch(idx_pair() if form == "idx" else {"a.parquet": write_parquet(DIGITS)})
    assert (batch.images == DIGITS.images).all()
    assert (batch.labels == DIGITS.labels).all()


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_an_idx_pair_is_read_packed_or_not(pack: Callable[[bytes], bytes]) -> None:
    suffix = "" if pack is bytes else ".gz"
    batch = parse_batch({f"{n}{suffix}": pack(c) for n, c in idx_pair().items()})
    assert (batch.images == DIGITS.images).all()
    assert batch.labels.tolist() == DIGITS.labels.tolist()
    assert batch.labels.dtype == np.int64


@pytest.fixture(scope="module")
def forked() -> Iterator[Any]:
    with parsers() as run:
        yield run


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch, forked: Any) -> None:
    """Let the parser's processes start fast; `RUN` in its place starts them as in earnest."""
    monkeypatch.setattr("tasks.arrivals.batch_files.subprocess.run", forked)


@pytest.mark.slow
def test_a_hundred_honest_batches_are_read_as_they_were_written() -> None:
    digits, draw = embedded_sample()[0], np.random.default_rng(6)
    for _ in range(100):
        rows = draw.choice(len(digits), draw.integers(1, 30))
        part = Digits(digits.images[rows], digits.labels[rows])
        labels = write_idx(part.labels.astype(np.uint8))
        pair = {f"{IMAGES}.gz": gzip.compress(write_idx(part.images), 1), LABELS: labels}
        for files in (pair, {"train.parquet": write_parquet(part), "_SUCCESS": b""}):
            batch = parse_batch(files)
            assert (batch.images == part.images).all()
            assert (batch.labels == part.labels).all()


def test_files_are_joined_in_the_order_of_their_names() -> None:
    batch = parse_batch(
        {
            "b.parquet": write_parquet(DIGITS.part(9, 20)),
            "a.parquet": write_parquet(DIGITS.part(0, 9)),
        }
    )
    assert (batch.images == DIGITS.images).all()


@pytest.mark.parametrize(
    "options",
    [
        {"data_page_version": "2.0"},
        {"use_dictionary": False},
        {"row_group_size": 3, "data_page_size": 500},
        {"dictionary_pagesize_limit": 300},  # falls back to plain pages in the middle of a column
        *({"compression": name} for name in ("none", "gzip", "zstd", "lz4", "brotli")),
    ],
    ids=str,
)
def test_parquet_is_read_however_its_pages_are_written(options: dict[str, object]) -> None:
    files = parquet([by_pillow(image) for image in DIGITS.images], **options)
    assert (parse_batch(files).images == DIGITS.images).all()


@pytest.mark.parametrize("width", [pa.int8(), pa.uint8(), pa.int32(), pa.uint64(), pa.int64()])
def test_labels_are_integers_of_any_width_and_value(width: pa.DataType) -> None:
    files = parquet([png()] * 3, pa.array([0, 10, 99], width))
    assert parse_batch(files).labels.tolist() == [0, 10, 99]


def filtered(pixels: np.ndarray, kinds: np.ndarray) -> bytes:
    """Apply row filters as the PNG specification words them, pixel by pixel."""
    lines, (height, width) = bytearray(), pixels.shape
    padded = np.pad(pixels.astype(int), ((1, 0), (1, 0)))
    for y in range(height):
        lines.append(kinds[y])
        for x in range(width):
            left, up, corner = padded[y + 1, x], padded[y, x + 1], padded[y, x]
            plane = left + up - corner
            nearest = min((left, up, corner), key=lambda value: abs(plane - value))
            lines.append(
                (int(pixels[y, x]) - (0, left, up, (left + up) // 2, nearest)[kinds[y]]) % 256
            )
    return bytes(lines)


@pytest.mark.parametrize("filters", [[0], [1], [2], [3], [4], [0, 1, 2, 3, 4]], ids=str)
@pytest.mark.parametrize("size", [(28, 28), (9, 5), (1, 1)], ids=str)
def test_every_row_filter_is_undone_as_pillow_undoes_it(
    filters: list[int], size: tuple[int, int]
) -> None:
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (8, *size), np.uint8)
    pngs = [png(filtered(image, draw.choice(filters, size[0])), size[::-1]) for image in images]
    batch = parse_batch(parquet(pngs))
    for image, read, content in zip(images, batch.images, pngs, strict=True):
        assert (read == np.asarray(Image.open(io.BytesIO(content)))).all()
        assert (read == image).all()


def test_texts_beside_the_pixels_and_pixels_in_pieces_are_no_obstacle() -> None:
    whole = png(b"".join(b"\0" + bytes([y] * 28) for y in range(28)))
    at = whole.index(b"IDAT") - 4
    data = whole[at + 8 : -16]
    pieces = whole[:at] + chunk(b"tEXt", b"Title\0seven")
    pieces += chunk(b"IDAT", data[:7]) + chunk(b"IDAT", b"") + chunk(b"IDAT", data[7:])
    batch = parse_batch(parquet([pieces + chunk(b"IEND", b"")]))
    assert batch.images[0, :, 5].tolist() == list(range(28))


def test_images_of_another_size_are_left_to_the_expectations() -> None:
    images = write_idx(np.zeros((20, 32, 30), np.uint8))
    assert parse_batch(idx_pair(images)).images.shape == (20, 32, 30)
    assert parse_batch(parquet([png(bytes(32 * 31), (30, 32))])).images.shape == (1, 32, 30)


# Names and sizes


@pytest.mark.parametrize(
    "name",
    [
        "../train.parquet",
        "..",
        ".",
        "./train.parquet",
        ".hidden.parquet",
        "/etc/passwd.parquet",
        "inner/train.parquet",
        "inner//train.parquet",
        "inner\\train.parquet",
        "C:train.parquet",
        "train\n.parquet",
        "train\0.parquet",
        "train\x1b[2J.parquet",
        "train .parquet",
        "trаin.parquet",  # noqa: RUF001 - that is the point: a Cyrillic letter
        "train\u202e.parquet",
        "train.parquet -> /etc/passwd",
        "train.parquet\n",
        "",
        "x" * MAX_NAME + ".parquet",
    ],
    ids=ascii,
)
def test_a_name_that_is_not_plain_is_refused(name: str) -> None:
    with pytest.raises(BadBatch, match="is no plain file name; expected at most 200") as error:
        check_names({name: 100})
    assert str(error.value).isascii()
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 2000


@pytest.mark.parametrize(
    "name", ["train.zip", "train.pkl", "train.parquet.rclonelink", "labels.csv"]
)
def test_a_foreign_file_is_refused_and_not_opened(name: str) -> None:
    refused({name: b"\x80\x04.", "train.parquet": write_parquet(DIGITS)}, name, "it was not opened")


@pytest.mark.parametrize("files", [{}, {"_SUCCESS": b""}], ids=["nothing", "a marker alone"])
def test_an_empty_batch_is_refused(files: Files) -> None:
    refused(files, "the batch has no file")


def test_an_empty_file_is_refused() -> None:
    refused(idx_pair(labels=b""), f"{LABELS} is empty")
    refused({"train.parquet": b""}, "train.parquet is empty")


def test_two_files_of_images_are_refused() -> None:
    refused(idx_pair() | {"t10k-images-idx3-ubyte.gz": b"-"}, "expected one pair", "t10k-images")
    refused({IMAGES: b"-", f"{IMAGES}.gz": b"-"}, "expected one pair")


def test_half_a_pair_is_refused() -> None:
    refused({IMAGES: write_idx(DIGITS.images)}, "expected one pair")


def test_images_and_labels_of_two_names_are_refused() -> None:
    refused({IMAGES: b"-", "t10k-labels-idx1-ubyte": b"-"}, "expected one pair")


def test_idx_and_parquet_together_are_refused() -> None:
    refused(idx_pair() | {"a.parquet": b"-"}, "the batch mixes IDX and Parquet")


def test_too_many_files_are_refused() -> None:
    with pytest.raises(BadBatch, match="the batch has 201 files; expected at most 200"):
        check_names({f"{number}.parquet": 1 for number in range(MAX_FILES + 1)})


def test_files_that_are_too_large_are_refused() -> None:
    with pytest.raises(
        BadBatch, match=r"a.parquet has 419430401 bytes; expected at most 419430400"
    ):
        check_names({"a.parquet": (400 << 20) + 1})
    with pytest.raises(BadBatch, match="the batch has 629145600 bytes; expected at most 536870912"):
        check_names({"a.parquet": 300 << 20, "b.parquet": 300 << 20})


# IDX


def test_a_truncated_gzip_is_refused() -> None:
    whole = gzip.compress(write_idx(DIGITS.images))
    for length in (15, len(whole) // 2, len(whole) - 1):
        files = {f"{IMAGES}.gz": whole[:length], LABELS: idx_pair()[LABELS]}
        refused(files, f"{IMAGES}.gz is a truncated gzip file")


def test_a_gzip_with_a_wrong_checksum_is_refused() -> None:
    whole = bytearray(gzip.compress(write_idx(DIGITS.images)))
    whole[-6] ^= 1
    refused(idx_pair(bytes(whole)), "is a corrupt gzip file")


def test_what_follows_a_gzip_is_refused() -> None:
    refused(idx_pair(gzip.compress(write_idx(DIGITS.images)) + b"PK"), "goes on for 2 bytes after")


@pytest.mark.parametrize(
    ("head", "sentence"),
    [
        (b"", "starts with '00000000'; expected the IDX magic"),
        (
            write_idx(DIGITS.images),
            "promises 15680 values of shape (20, 28, 28) but holds more than",
        ),
        (struct.pack(">IIII", 0x803, 1 << 20, 32, 32), "promises 1073741824 values"),
    ],
    ids=["of zeros", "behind honest images", "honest about its size"],
)
def test_a_gzip_bomb_of_a_gibibyte_ends_in_a_sentence(head: bytes, sentence: str) -> None:
    files = idx_pair(gzipped_zeros(head, 1 << 30))
    assert len(files[IMAGES]) < 2 * MIB
    with at_most(8 * MIB):
        refused(files, IMAGES, sentence)


def test_a_wrong_magic_is_refused() -> None:
    refused(idx_pair(b"\x00\x00\x0d\x03" + bytes(100)), "starts with '00000d03'; expected the IDX")
    refused(idx_pair(by_pillow(DIGITS.images[0])), "starts with '89504e47'; expected the IDX")


def test_images_and_labels_exchanged_are_refused() -> None:
    files = idx_pair()
    refused({IMAGES: files[LABELS], LABELS: files[IMAGES]}, "0x00000803", "were images and labels")


def test_a_header_that_promises_more_or_less_is_refused() -> None:
    whole = write_idx(DIGITS.images)
    refused(idx_pair(whole[:-1]), "promises 15680 values of shape (20, 28, 28) but holds 15679")
    refused(idx_pair(gzip.compress(whole[:-1])), "but holds 15679")
    refused(idx_pair(whole + b"\0"), "but holds 15681")
    refused(idx_pair(whole[:9]), "ends inside its header: 9 of 16 bytes")
    huge = struct.pack(">IIII", 0x803, *[0xFFFFFFFF] * 3)
    refused(idx_pair(huge), "promises 79228162458924105385300197375 values", "expected at most")


def test_more_or_fewer_labels_than_images_are_refused() -> None:
    refused(
        idx_pair(labels=write_idx(np.zeros(19, np.uint8))),
        "20 images but",
        "19 labels",
        IMAGES,
        LABELS,
    )


@pytest.mark.parametrize("shape", [(0, 28, 28), (0, 0, 0)], ids=str)
def test_zero_images_are_refused(shape: tuple[int, ...]) -> None:
    files = idx_pair(write_idx(np.zeros(shape, np.uint8)), write_idx(np.zeros(0, np.uint8)))
    refused(files, "expected images of at least 1", "at least one of them")


@pytest.mark.parametrize("size", [(0, 28), (28, 0), (28, 65), (3000, 3000)], ids=str)
def test_an_idx_file_of_images_without_or_with_too_many_pixels_is_refused(
    size: tuple[int, int],
) -> None:
    files = idx_pair(write_idx(np.zeros((2, *size), np.uint8)), write_idx(np.zeros(2, np.uint8)))
    refused(
        files, f"2 x {size[0]} x {size[1]} pixels; expected images of at least 1 and at most 64"
    )


def test_more_images_than_a_batch_may_have_are_refused() -> None:
    labels = write_idx(np.zeros(MAX_IMAGES + 1, np.uint8))
    refused(idx_pair(labels=labels), LABELS, "promises 500001 values", "at most 500000")
    refused(
        {"a.parquet": written(pa.table({"image": pa.array([None] * 500_001, HF), "label": ZEROS}))},
        "a.parquet promises 500001 rows",
        "at most 500000 in all",
    )


# Parquet

HF = pa.struct({"bytes": pa.binary(), "path": pa.string()})
ZEROS = pa.array(np.zeros(MAX_IMAGES + 1, np.int64))


@pytest.mark.parametrize(
    "labels",
    [pa.array(["5"]), pa.array([5.0]), pa.array([True]), pa.nulls(1), pa.array([[5]])],
    ids=["text", "float", "bool", "nothing", "lists"],
)
def test_labels_that_are_no_integers_are_refused(labels: pa.Array) -> None:
    refused(parquet([png()], labels), "labels of type", str(labels.type)[:4], "expected integers")


def test_null_labels_are_refused_with_their_number() -> None:
    labels = pa.array([1, 2, None, 4, None])
    refused(parquet([png()] * 5, labels), "2 of 5 labels are null, the first in row 2")


def test_a_label_beyond_64_bits_is_refused() -> None:
    refused(parquet([png()], pa.array([1 << 63], pa.uint64())), "train.parquet cannot be read")


def test_null_images_are_refused_with_their_number() -> None:
    rows = [{"bytes": png(), "path": None}, {"bytes": None, "path": "/etc/passwd"}, None]
    table = pa.table({"image": pa.array(rows, HF), "label": [1, 2, 3]})
    refused({"a.parquet": written(table)}, "a.parquet: 2 of 3 images", "in row 1, is null")


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"picture": [b"-"], "label": [5]}, "0 columns 'image' among ['picture', 'label']"),
        ({"image": pa.array([None], HF), "target": [5]}, "0 columns 'label'"),
        ({"image": [b"-"], "label": [5]}, "images of type binary; expected struct<bytes: binary"),
        ({"image": [[0, 0]], "label": [5]}, "images of type list"),
        ({"image": [{"path": "a.png"}], "label": [5]}, "images of type struct<path: string>"),
        ({"image": [{"bytes": "text"}], "label": [5]}, "images of type struct<bytes: "),
        ({"image": [{"bytes": [1, 2]}], "label": [5]}, "images of type struct<bytes: list"),
        ({"image": [{"bytes": b"-"}], "label": [{"label": 5}]}, "labels of type struct"),
    ],
)
def test_parquet_without_the_columns_is_refused(columns: Files, sentence: str) -> None:
    refused({"a.parquet": written(pa.table(columns))}, "a.parquet", sentence)


def test_a_column_that_is_there_twice_is_refused() -> None:
    image = pa.array([None], HF)
    table = pa.Table.from_arrays([image, pa.array([1]), pa.array([2])], ["image", "label", "label"])
    refused({"a.parquet": written(table)}, "2 columns 'label'")


def test_parquet_of_no_rows_is_refused() -> None:
    table = pa.table({"image": pa.array([], HF), "label": pa.array([], pa.int64())})
    refused({"a.parquet": written(table)}, "a.parquet has 0 rows")


def test_a_corrupt_footer_is_refused() -> None:
    whole = write_parquet(DIGITS)
    footer = int.from_bytes(whole[-8:-4], "little")
    corrupt = whole[: -8 - footer] + b"\xff" * footer + whole[-8:]
    refused({"a.parquet": corrupt}, "a.parquet has a corrupt footer or page header")
    refused({"a.parquet": whole[:-1]}, "a.parquet is no whole Parquet file")
    refused({"a.parquet": whole[: len(whole) // 2]}, "is no whole Parquet file")
    refused({"a.parquet": whole[:-8] + b"\xff\xff\xff\x7fPAR1"}, "is no whole Parquet file")


@pytest.mark.parametrize(
    "nested", [b"\x19", b"\x1c", b"\x19\x1c"], ids=["lists", "structs", "both"]
)
def test_a_footer_nested_without_end_is_refused(nested: bytes) -> None:
    footer = nested * 100_000
    content = b"PAR1" + footer + struct.pack("<I", len(footer)) + b"PAR1"
    refused({"a.parquet": content}, "a.parquet has a corrupt footer")


def test_a_footer_of_megabytes_is_refused() -> None:
    table = pa.table({"image": pa.array([None], HF), "label": [5]})
    content = written(table.replace_schema_metadata({"note": "x" * 2 * MIB}))
    refused({"a.parquet": content}, "has a footer of", "write row groups of 1,000 rows")


def bomb(values: int, **options: Any) -> Files:
    """Return less than a megabyte that unpacks to that many values of 64 MiB."""
    value = bytes(64 * MIB)
    files = parquet([value] * values, compression="zstd", use_dictionary=False, **options)
    assert len(files["train.parquet"]) < MIB
    return files


@pytest.mark.slow
def test_a_parquet_bomb_is_not_unpacked() -> None:
    refused(
        bomb(9, write_statistics=False),
        "train.parquet unpacks to 6039",
        f"expected at most {MAX_BATCH_BYTES}: it was not unpacked",
    )


@pytest.mark.slow
def test_a_huge_value_is_refused_by_its_size() -> None:
    refused(bomb(1), "has an image of 67108864 bytes in rows 0 to 0", "PNGs of at most 16384")


@pytest.mark.slow
def test_a_batch_that_takes_too_much_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.arrivals.batch_files.PARSER_BYTES", 384 * MIB)
    sentence = "takes more than 384 MiB of memory to parse; expected less: write it again"
    refused(bomb(4), sentence)


def in_the_parser(monkeypatch: pytest.MonkeyPatch, parse: str, main: str = "1 << 31, 1") -> None:
    """Let the parser's process parse by that expression, and have one second of a processor."""
    lines = f"import tasks.arrivals.parser as p; p.parse = lambda _: {parse}; p.main({main})"
    monkeypatch.setattr(
        "tasks.arrivals.batch_files.subprocess.run",
        lambda _, **given: RUN([sys.executable, "-c", lines], **given),
    )


def test_a_batch_that_takes_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    in_the_parser(monkeypatch, "exec('while True: pass')")
    refused(idx_pair(), "ended the process that parsed it by SIGXCPU", "300 seconds to parse")


@pytest.mark.slow
def test_a_limit_on_time_from_outside_ends_the_parser_by_the_same_signal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At its hard limit the kernel sends SIGKILL, which would be no verdict on the batch."""
    outside = "p.resource.setrlimit(p.resource.RLIMIT_CPU, (3, 3)) or 1 << 31, 300"
    in_the_parser(monkeypatch, "exec('while True: pass')", outside)
    refused(idx_pair(), "ended the process that parsed it by SIGXCPU")


def test_a_parser_that_waits_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.arrivals.batch_files.PARSER_WAIT", 0.01)
    monkeypatch.setattr("tasks.arrivals.batch_files.subprocess.run", RUN)
    with pytest.raises(ParserInterrupted, match=r"not parsed after 0\.01 seconds.*try later"):
        parse_batch(idx_pair())


@pytest.mark.parametrize("sent", ["SIGKILL", "SIGTERM", "signal 40"])
def test_what_ends_the_parser_from_outside_is_no_verdict(
    monkeypatch: pytest.MonkeyPatch, sent: str
) -> None:
    number = int(sent[7:]) if " " in sent else signal.Signals[sent].value
    kill = [sys.executable, "-c", f"import os, signal; os.kill(os.getpid(), {number})"]
    monkeypatch.setattr(
        "tasks.arrivals.batch_files.subprocess.run", lambda _, **given: RUN(kill, **given)
    )
    with pytest.raises(ParserInterrupted, match=f"was ended by {sent}, which it did not cause"):
        parse_batch(idx_pair())


def test_the_parser_gets_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_PROFILE", "MLFLOW_TRACKING_USERNAME", "PREFECT_API_AUTH_STRING"):
        monkeypatch.setenv(name, "secret")
    for name in ("HUB_TOKEN", "DATABASE_PASSWORD", "CLIENT_SECRET", "API_KEY"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("MNIST_STACK", "/a/stack")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/a/library")
    given: dict[str, str] = {}

    def note(command: list[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
        given.update(options["env"])
        return RUN(command, **options)

    monkeypatch.setattr("tasks.arrivals.batch_files.subprocess.run", note)
    parse_batch(idx_pair())
    assert given["MNIST_STACK"] == "/a/stack"
    assert given["LD_LIBRARY_PATH"] == "/a/library"
    assert "secret" not in given.values()


def test_an_error_of_a_library_over_the_files_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    in_the_parser(monkeypatch, "{}['x']")
    refused(idx_pair(), "the files cannot be read (KeyError: 'x'); expected plain IDX or Parquet")


def test_a_column_called_like_a_field_is_refused() -> None:
    image = pa.array([{"bytes": png(), "path": None}], HF)
    table = pa.table({"image": image, "label": [5], "image.bytes": [b"x"]})
    refused({"a.parquet": written(table)}, "has a column 'image.bytes' beside 'image'")


def test_a_page_that_promises_billions_of_values_is_not_unpacked() -> None:
    content = parquet([png()])["train.parquet"]
    header = b"\x15\x04\x15\x9a\x01\x15\x9c\x01\x4c\x15\x02\x15\x00"  # a dictionary of one value
    assert content[4:].startswith(header)
    lie = header.replace(b"\x4c\x15\x02\x15\x00", b"\x4c\x15\xfe\xff\xff\xff\x0f\x00\x00")
    # What followed is overwritten, so that every place in the footer stays right.
    refused(
        {"a.parquet": content[:4] + lie + content[4 + len(lie) :]},
        "cannot be read as Parquet",
        "Deserializing page header failed",
    )


@pytest.mark.slow
def test_size_statistics_that_end_arrows_process_are_never_asked_for() -> None:
    """Arrow 25 calls `terminate` if Python asks it for the metadata of such a column."""
    content = parquet([png()] * 3)["train.parquet"]
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    for at in range(footer, len(content) - 8):
        for value in (0x29, 0x36, 0x46):  # a list is made longer, an integer is put for another
            damaged = bytearray(content)
            damaged[at] = value
            try:
                batch = parse_batch({"a.parquet": bytes(damaged)})
            except BadBatch as error:
                assert str(error).startswith("a.parquet")  # noqa: PT017 - either outcome is right
            else:
                assert len(batch) == 3


@pytest.mark.slow
def test_a_value_that_all_rows_share_is_no_bomb() -> None:
    """A megabyte, once in the file, that 300,000 rows refer to: 300 GB if it were written out."""
    shared = pa.DictionaryArray.from_arrays(
        pa.array(np.zeros(300_000, np.int32)), pa.array([bytes(1_000_000)])
    )
    paths = pa.nulls(300_000, pa.string())
    image = pa.StructArray.from_arrays([shared, paths], ["bytes", "path"])
    content = written(pa.table({"image": image, "label": ZEROS[:300_000]}), store_schema=False)
    assert len(content) < MIB
    with at_most(16 * MIB):
        refused({"a.parquet": content}, "an image of 1000000 bytes in rows 0 to 4095")


@pytest.mark.parametrize("encoding", ["DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"])
def test_encodings_that_repeat_what_came_before_are_refused(encoding: str) -> None:
    columns = {"image.bytes": encoding}
    files = parquet([png()] * 9, use_dictionary=False, column_encoding=columns)
    refused(files, "train.parquet cannot be read as Parquet", "expected a whole file, plain or")


# PNG

GREY = DIGITS.images[0]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"GIF89a" + bytes(99), "begins with '4749463839610000'; expected a PNG's"),
        (b"", "begins with ''; expected a PNG's"),
        (by_pillow(GREY, "I;16"), "is a PNG of 16 bits, greyscale; expected 8 bits, greyscale"),
        (by_pillow(GREY, "1"), "is a PNG of 1 bits, greyscale"),
        (by_pillow(GREY, "RGB"), "is a PNG of 8 bits, colour;"),
        (by_pillow(GREY, "RGBA"), "is a PNG of 8 bits, colour with alpha"),
        (by_pillow(GREY, "LA"), "is a PNG of 8 bits, greyscale with alpha"),
        (by_pillow(GREY, "P"), "is a PNG of 8 bits, palette"),
        (png(pixel=(8, 7, 0)), "is a PNG of 8 bits, colour type 7"),
        (png(pixel=(8, 0, 1)), "interlace methods [0, 0, 1]"),
        (by_pillow(np.zeros((3000, 3000), np.uint8)), "is 3000 x 3000 pixels; expected 1 to 64"),
        (png(size=(0, 28)), "is 28 x 0 pixels; expected 1 to 64"),
        (png()[:20], "is a PNG cut off after 20 bytes"),
        (png()[:50], "is a PNG cut off after 50 bytes"),
        (png()[:-5], "is a PNG cut off after"),
        (png(bytes(100)), "promises 812 bytes of lines but holds 100"),
        (png(bytes(10_000_000)), "promises 812 bytes of lines but holds more than 812"),
        (png(b"\x05" + bytes(811)), "has a row filter beyond PNG's five"),
        (png(extra=chunk(b"tRNS", b"\0\0")), "has a chunk tRNS; expected opaque greyscale"),
        (png(extra=chunk(b"PLTE", bytes(768))), "has a chunk PLTE; expected opaque greyscale"),
        (png(extra=chunk(b"eVIL", b"")[:-1] + b"\0"), "has a chunk eVIL with a wrong checksum"),
        (png()[:8] + chunk(b"IEND", b""), "begins with a chunk IEND; expected IHDR"),
        (png()[:8] + chunk(b"IDAT", b""), "begins with a chunk IDAT; expected IHDR"),
        (png()[:33] + chunk(b"IDAT", b"\xff" * 50) + chunk(b"IEND", b""), "has corrupt pixels"),
        (png()[:33] + chunk(b"IEND", b""), "promises 812 bytes of lines but holds 0"),
        (png(size=(30, 32), lines=bytes(32 * 31)), "is 32 x 30 pixels; expected 28 x 28, as the"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_an_image_that_may_not_be_read_is_named_with_what_is_wrong(
    content: bytes, sentence: str
) -> None:
    pngs = [png()] * 7
    pngs[3] = pngs[5] = content
    refused(
        parquet(pngs),
        "train.parquet: 2 of 7 images cannot be read; the first, in row 3, ",
        sentence,
    )


def test_bad_images_are_counted_over_the_whole_file() -> None:
    pngs = [png()] * 9000
    pngs[4500] = pngs[8999] = b"no image"
    refused(parquet(pngs), "2 of 9000 images cannot be read; the first, in row 4500,")


def test_an_image_of_many_bytes_is_refused_before_it_is_unpacked() -> None:
    refused(parquet([png(extra=chunk(b"tEXt", bytes(20_000)))]), "expected PNGs of at most 16384")


# Whatever is sent


@pytest.mark.slow
@pytest.mark.parametrize("form", ["idx", "idx.gz", "parquet", "png"])
def test_five_hundred_damaged_files_end_in_a_sentence_or_a_batch(form: str) -> None:
    chance, part = random.Random(form), DIGITS.part(0, 4)  # noqa: S311 - repeatable on purpose
    images, labels = write_idx(part.images), write_idx(part.labels.astype(np.uint8))
    forms: dict[str, tuple[bytes, Callable[[bytes], Files]]] = {
        "idx": (images, lambda damaged: {IMAGES: damaged, LABELS: labels}),
        "idx.gz": (gzip.compress(images), lambda damaged: {IMAGES: damaged, LABELS: labels}),
        "parquet": (write_parquet(part), lambda damaged: {"a.parquet": damaged}),
        "png": (by_pillow(GREY), lambda damaged: parquet([by_pillow(GREY), damaged])),
    }
    content, whole = forms[form]
    refusals = 0
    with at_most(256 * MIB):
        for _ in range(500):
            damaged = bytearray(content)
            for _ in range(chance.choice([1, 1, 2, 8])):
                damaged[chance.randrange(len(damaged))] = chance.randrange(256)
            if chance.random() < 0.2:
                del damaged[chance.randrange(len(damaged)) :]
            try:
                batch = parse_batch(whole(bytes(damaged)))
            except BadBatch as error:
                assert str(error).isascii()  # noqa: PT017 - either outcome is right
                refusals += 1
            else:
                assert isinstance(batch, RawBatch)
                assert batch.images.dtype == np.uint8
                assert batch.images.shape == (len(batch), *batch.images.shape[1:])
                assert batch.labels.dtype == np.int64
    assert refusals > 50
