"""Parse the files of an arriving batch: from untrusted bytes to plain arrays.

A batch is a flat folder with an IDX pair (gzipped or not) or Parquet files in the Hugging Face
image layout, `image` a struct whose `bytes` are a PNG and `label` an integer. Declared sizes are
checked before anything is unpacked, and `tasks.arrivals.parser` parses in a child process with
limits on memory and time, whatever the files do to the libraries that read them.
Nothing here judges digits: images of any look and labels of any value are left to the expectations.
"""

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from tempfile import TemporaryFile
from typing import IO

import numpy as np
from numpy.typing import NDArray

from mnist_cnn.digits import SIDE, Digits

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

MAX_SIDE = 64
"""Maximum height and width of an image, pixels: enough for 32 x 32 to reach the expectations."""

PARSER_BYTES = 2 << 30
"""Maximum address space of the child process: libraries 0.3, files 0.5, images 0.4 GB and room."""

PARSER_SECONDS = 300
"""Maximum processor time of the child process: five times what the largest batch takes."""

PARSER_WAIT = 900
"""Maximum wait for the child process, in seconds; other work may keep it from the processor."""

_CRASHES = {"SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGSEGV", "SIGXCPU"}
"""Signals by which a process ends for what it read; any other comes from elsewhere."""

_SECRET = re.compile(
    r"^(AWS|MLFLOW|PREFECT)_|(KEY|PASSWORD|SECRET|TOKEN|URL|PROXY)$", re.IGNORECASE
)
"""Names of environment variables that the child process does not get."""

MARKER = "_SUCCESS"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_IDX_NAME = re.compile(r"(.*)(images[.-]idx3|labels[.-]idx1)-ubyte(\.gz)?")


class BadBatch(ValueError):
    """A batch cannot be read.

    The message names the file, the observed and the expected value; rows count from 0.
    """


class ParserInterrupted(ConnectionError):
    """Something outside ended the child process; nothing is known of the batch. Worth a retry."""


@dataclass(frozen=True, eq=False)
class RawBatch:
    """Images and labels of a batch: readable, of one size, and not judged yet.

    `images` is uint8 (N, height, width) with N of at least 1 and sides of 1 to `MAX_SIDE`;
    `labels` is int64 (N,), of any value.
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

    `files` maps names, relative to the batch's folder, to contents. They are parsed in a child
    process. Raises BadBatch for any content that cannot be parsed, or not within the limits,
    ParserInterrupted if something else ended the process, and RuntimeError if it does not work.
    """
    check_names({name: len(content) for name, content in files.items()})
    sizes = {name: len(content) for name, content in files.items() if name != MARKER}
    # Through files: with pipes each side could wait for the other for ever.
    with TemporaryFile() as sent, TemporaryFile() as parsed:
        sent.write(json.dumps(sizes).encode() + b"\n")
        sent.writelines(files[name] for name in sizes)
        sent.seek(0)
        _run_parser(sent, parsed)
        parsed.seek(0)
        if reason := parsed.readline().decode().rstrip("\n"):
            raise BadBatch(reason)
        images, labels = (np.load(parsed, allow_pickle=False) for _ in range(2))
    return RawBatch(images, labels)


def _run_parser(sent: IO[bytes], parsed: IO[bytes]) -> None:
    """Run the parser; BadBatch if its limit, or a crash over these files, ends it."""
    expected = (
        f"expected files that take at most {PARSER_BYTES >> 20} MiB and {PARSER_SECONDS} seconds "
        "to parse: write them again, or send them as several batches"
    )
    # A new interpreter, not a fork, which may hang where this process has threads.
    command = [sys.executable, "-m", "tasks.arrivals.parser"]
    # No credentials, and no threads or pools that reserve address space for each processor.
    environment = {name: value for name, value in os.environ.items() if not _SECRET.search(name)}
    environment |= {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "ARROW_DEFAULT_MEMORY_POOL": "system",
        "OPENBLAS_NUM_THREADS": "1",
    }
    try:
        ended = subprocess.run(  # noqa: S603 - it starts this project's own module
            [*command, str(PARSER_BYTES), str(PARSER_SECONDS)],
            stdin=sent,
            stdout=parsed,
            stderr=subprocess.PIPE,
            env=environment,
            timeout=PARSER_WAIT,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ParserInterrupted(
            f"the batch is not parsed after {PARSER_WAIT} seconds, of which its process had less "
            f"than {PARSER_SECONDS} of a processor: the machine is too busy, try later"
        ) from error
    if ended.returncode < 0:
        number = -ended.returncode
        known = {each.value: each.name for each in signal.Signals}
        name = known.get(number, f"signal {number}")  # those for real time have no name
        if name not in _CRASHES:
            raise ParserInterrupted(
                f"the process that parsed the batch was ended by {name}, which it did not cause: "
                "by a person, or because the machine has no memory left; try later"
            )
        raise BadBatch(f"the batch ended the process that parsed it by {name}; {expected}")
    if ended.returncode:
        raise RuntimeError(f"the parser does not work: {ended.stderr.decode()[-2000:]}")


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
