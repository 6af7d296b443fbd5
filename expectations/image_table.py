"""The per-image table that the expectations read: one row an image, one column a measured feature.

This module measures and does not judge. Bad images (blank, inverted, of another size) and labels
outside 0-9 get a row like any other, so that an expectation can name the fault.
"""

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mnist_cnn.digits import CLASSES, SIDE
from mnist_cnn.styles import measure_strokes

if TYPE_CHECKING:
    import pandas as pd

_AXES = 3  # of a stack of grey images: (N, height, width)
_CHUNK = 4096  # images measured at a time: 13 MB as float32, so that memory does not grow with N
_GRID = 7  # blocks along a side of the coarse image, 4 x 4 pixels each

# The mean image of each digit in MNIST's training split, 7 x 7 blocks row by row, 0 to f. The
# comparison with it gives the orientation of a digit, which no statistic of pixels alone can.
_MEAN_DIGITS = (
    "0000000003ab3002ba9a006b24b10983a7005dd8100011000",
    "000000000056100009700000e200003d10000681000000000",
    "0001100017b9200144a300138a2005cea5104a76400000000",
    "0000000027b8100148b20006db200223a4004ac9100011000",
    "00000000022430028494004d9e30026ba1000265100001100",
    "00000000037851018953101aa6100235830039b7100011000",
    "00022000038510017821002b9a6002dcc50005a5100000000",
    "0000000012331004bbe400233c200019810004a3000034100",
    "0000000003a9300198a60017f910019b71002ac7100012100",
    "0000000001651001a8b3003b9e10014991000285100023200",
)

TURNS: dict[str, Callable[[NDArray[Any]], NDArray[Any]]] = {
    "mirrored": lambda grid: grid[:, :, ::-1],
    "flipped": lambda grid: grid[:, ::-1],
    "rotated_180": lambda grid: grid[:, ::-1, ::-1],
    "transposed": lambda grid: grid.transpose(0, 2, 1),
    "rotated_90": lambda grid: np.rot90(grid, 1, (1, 2)),
    "rotated_270": lambda grid: np.rot90(grid, 3, (1, 2)),
    "anti_transposed": lambda grid: grid.transpose(0, 2, 1)[:, ::-1, ::-1],
}
"""The seven wrong orientations of a square image, as maps of grids (N, 7, 7) to grids (N, 7, 7).

Each has a column `upright_over_NAME`.
"""

Features = dict[str, NDArray[Any]]


def image_table(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> "pd.DataFrame":
    """Return the image table: one row an image, with its label and its pixel features.

    `images` is uint8 (N, height, width) of any quality, `labels` int64 (N,) of any value. Features
    of position (`border` to `near_digest`, but not `digest`) are taken from the middle 28 x 28
    pixels, padded with 0.

    - `label`, `height`, `width`, `minimum`, `maximum`, `mean`, `contrast` (standard deviation),
      `ink` (share of pixels of 128 and more), `blank`, `constant`;
    - `border`: mean of the outermost ring of pixels; `centre_over_border`: mean of the middle
      14 x 14 less that, negative in an inverted image;
    - `centre_x`, `centre_y`: centre of mass, pixels; `slant`: shear, positive when the top leans
      to the right; `stroke_width` and `stroke_length`: pixels, in noise small and large;
    - `upright_over_NAME`: the correlation with the upright mean digit of the label, less the
      correlation with the same digit turned (see `TURNS`), and `upright_over_any`: the least of
      these; missing for a label outside 0-9;
    - `label_match`: true if the image resembles the mean MNIST digit of its label most, and
      `label_agrees`: the same with the mean digits of these very images;
    - `digest`: 64 bits of BLAKE2 of size and pixels; `near_digest`: 64 bits of the pattern of
      bright and dark 2 x 2 blocks, which survives a change of brightness and most re-encodings.

    Raises ValueError if types or lengths do not fit together.
    """
    import pandas as pd

    if images.dtype != np.uint8 or images.ndim != _AXES:
        raise ValueError(
            f"images are {images.dtype} of shape {images.shape}; "
            "expected uint8 of shape (N, height, width)"
        )
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels are {labels.dtype} of shape {labels.shape}; expected one integer for each of "
            f"the {len(images)} images: check that both belong to the same data"
        )
    # At least one chunk, so that a table of no images has its columns too.
    parts = [_measured(images[at : at + _CHUNK]) for at in range(0, max(len(images), 1), _CHUNK)]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    coarse = columns.pop("coarse")  # (N, 49)
    return pd.DataFrame({"label": labels} | columns | _likenesses(coarse, labels))


def _measured(images: NDArray[np.uint8]) -> Features:
    """Return the features of one chunk, each (N,) except `coarse`, which is (N, 49)."""
    count, height, width = images.shape
    flat = images.reshape(count, height * width)  # (N, height * width)
    # The initial values are the result for images without pixels, where min and max would raise.
    minimum = flat.min(1, initial=255)  # (N,)
    maximum = flat.max(1, initial=0)  # (N,)
    middle = _middle(images)  # (N, 28, 28)
    pixels = middle.reshape(count, SIDE * SIDE).astype(np.float32)  # (N, 784)
    # Mean, border, centre and blocks are all weighted sums over pixels: one matrix product with one
    # column of weights each.
    sums = pixels @ _PLACES  # (N, 784) @ (784, 52) -> (N, 52)
    total, border, centre = sums[:, :3].T.astype(np.float64)  # each (N,)
    mean = total / SIDE**2  # (N,)
    square = np.einsum("np,np->n", pixels, pixels, dtype=np.float64) / SIDE**2  # (N,)
    strokes = measure_strokes(middle)
    return {
        "height": np.full(count, height),
        "width": np.full(count, width),
        "minimum": minimum.astype(np.int64),
        "maximum": maximum.astype(np.int64),
        "mean": mean,
        "contrast": np.sqrt(np.maximum(square - mean**2, 0)),
        "ink": strokes.ink,
        "blank": maximum == 0,
        "constant": minimum >= maximum,
        "border": border / (4 * (SIDE - 1)),
        "centre_over_border": centre / (SIDE // 2) ** 2 - border / (4 * (SIDE - 1)),
        "centre_x": strokes.centre_x,
        "centre_y": strokes.centre_y,
        "slant": strokes.shear,
        "stroke_width": strokes.width,
        "stroke_length": strokes.length,
        "digest": _digests(images),
        "near_digest": _near_digests(middle),
        "coarse": sums[:, 3:],
    }


def _middle(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the middle of each image, (N, 28, 28), padded with 0 where the image is smaller."""
    height, width = images.shape[1:]
    top = max(height - SIDE, 0) // 2
    left = max(width - SIDE, 0) // 2
    cut = images[:, top : top + SIDE, left : left + SIDE]  # (N, at most 28, at most 28)
    rows = SIDE - cut.shape[1]  # missing ones, split between top and bottom
    columns = SIDE - cut.shape[2]
    if rows or columns:
        margins = ((0, 0), (rows // 2, rows - rows // 2), (columns // 2, columns - columns // 2))
        cut = np.pad(cut, margins)  # (N, 28, 28)
    return np.ascontiguousarray(cut)


def _places() -> NDArray[np.float32]:
    """Return the weights (784, 3 + 49) of all sums over pixels: total, ring, middle, blocks."""
    y, x = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2  # (28, 28) each, 0 in the middle
    reach = np.maximum(abs(x), abs(y))  # (28, 28), 0.5 to 13.5: the square ring of each pixel
    # The number of the 4 x 4 block that a pixel belongs to, 0 to 48, row by row.
    block = (np.arange(SIDE) // (SIDE // _GRID))[:, None] * _GRID + np.arange(SIDE) // (
        SIDE // _GRID
    )  # (28, 1) + (28,) -> (28, 28)
    blocks = [block == index for index in range(_GRID**2)]  # 49 of (28, 28)
    ring = reach > SIDE / 2 - 1  # (28, 28), the outermost pixels
    middle = reach < SIDE / 4  # (28, 28), the inner 14 x 14 pixels
    weights = [np.ones_like(x), ring, middle, *blocks]  # 52 of (28, 28)
    return np.stack([weight.ravel() for weight in weights], axis=1).astype(np.float32)


_PLACES = _places()


def _digests(images: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Hash size and pixels of each image to 64 bits, int64 (N,).

    Among 10 million different images the probability of any collision is 3 in a million.
    """
    # The salt holds the size, at most 16 bytes: equal bytes of two shapes hash differently.
    salt = "x".join(map(str, images.shape[1:])).encode()[:16]
    rows = np.ascontiguousarray(images)
    joined = b"".join(hashlib.blake2b(row, digest_size=8, salt=salt).digest() for row in rows)
    return np.frombuffer(joined, np.int64)


def _near_digests(middle: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Hash the coarse pattern of each image to 64 bits, int64 (N,).

    The pattern has two bits for each 2 x 2 block: brighter than half the image's mean, and brighter
    than twice the mean.

    Of MNIST's last 10,000 training images 0.9 % share it with one of the first 50,000, nearly all
    of them ones that hardly differ. It stays the same for 96 % of those 10,000 at 90 % brightness,
    66 % after JPEG at quality 90, 62 % under noise of 3 grey levels.
    """
    # Thresholds relative to the image's own mean: the pattern hardly depends on its brightness.
    rows = middle[:, ::2].astype(np.int32) + middle[:, 1::2]  # (N, 14, 28)
    blocks = (rows[:, :, ::2] + rows[:, :, 1::2]).reshape(len(middle), (SIDE // 2) ** 2)  # (N, 196)
    share = blocks * blocks.shape[1]  # (N, 196), exact integers: no rounding can flip a bit
    total = blocks.sum(1, keepdims=True)  # (N, 1)
    bits = np.packbits(  # (N, 392) bool -> (N, 49) uint8
        np.concatenate([2 * share > total, share > 2 * total], axis=1), axis=1
    )
    joined = b"".join(hashlib.blake2b(row, digest_size=8).digest() for row in bits)
    return np.frombuffer(joined, np.int64)


def _likenesses(coarse: NDArray[np.float32], labels: NDArray[np.int64]) -> Features:
    """Correlate each coarse image, (N, 49), with the mean digits, upright and turned."""
    # A label outside 0-9 indexes digit 0, so that indexing works; its result becomes NaN.
    known = (labels >= 0) & (labels < CLASSES)  # (N,)
    own = np.where(known, labels, 0)  # (N,)
    images = _standardised(coarse)  # (N, 49)
    upright = np.array([[int(level, 16) for level in digit] for digit in _MEAN_DIGITS])  # (10, 49)
    likeness = images @ _standardised(upright).T  # (N, 10)
    stands = np.where(known, likeness[np.arange(len(own)), own], np.nan)  # (N,)
    columns: Features = {}
    for name, turn in TURNS.items():
        turned = _standardised(turn(upright.reshape(CLASSES, _GRID, _GRID)))  # (10, 49)
        # The scalar product of each image with the turned mean digit of its own label.
        columns[f"upright_over_{name}"] = stands - np.einsum("np,np->n", images, turned[own])
    columns["upright_over_any"] = np.minimum.reduce(list(columns.values()))  # (N,)
    columns["label_match"] = likeness.argmax(1) == labels  # (N,)
    # Sums serve as means: standardisation removes the scale, and an absent digit gives 0, not NaN.
    sums = np.stack([coarse[labels == digit].sum(0) for digit in range(CLASSES)])  # (10, 49)
    columns["label_agrees"] = (images @ _standardised(sums).T).argmax(1) == labels  # (N,)
    return columns


def _standardised(grids: NDArray[Any]) -> NDArray[np.float32]:
    """Return rows (N, 49) of mean 0 and length 1, so that their product is a correlation."""
    rows = grids.reshape(len(grids), _GRID**2).astype(np.float32)  # (N, 49)
    rows -= rows.mean(1, keepdims=True)
    # A constant grid has length 0; it stays 0 and correlates with nothing.
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)
    return rows
