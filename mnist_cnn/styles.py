"""The styles of handwriting, measured on each image: slant, stroke width, ink, aspect."""

import numpy as np
from numpy.typing import NDArray

from mnist_cnn.digits import SIDE

Floats = NDArray[np.float64]


STYLES = {
    "slant": "degrees to the right",
    "stroke width": "px",
    "ink": "share of the image",
    "aspect": "width over height",
}
"""What is measured of every image, and its unit."""


HALF = 128
"""A pixel of half of full ink."""


def measure_styles(images: NDArray[np.uint8], batch_size: int = 1000) -> dict[str, Floats]:
    """Return each statistic of `STYLES` for uint8 (N, 28, 28), as float64 (N,).

    Slant comes from the second moments of the ink. Stroke width is twice the area over the
    perimeter, which holds for any long stroke. Aspect is that of the box around the pixels of at
    least half ink. An image without such a pixel has NaN for all but the ink.
    """
    parts = [
        _styles_of(images[first : first + batch_size])
        for first in range(0, max(len(images), 1), batch_size)
    ]
    return {style: np.concatenate([part[style] for part in parts]) for style in STYLES}


def _styles_of(images: NDArray[np.uint8]) -> dict[str, Floats]:
    ink = images.astype(np.float32) / 255
    area = ink.sum((1, 2), dtype=np.float64)
    place = np.arange(SIDE, dtype=np.float32)
    by_row, by_column = ink.sum(2), ink.sum(1)
    inked = np.asarray(images >= HALF)
    with np.errstate(divide="ignore", invalid="ignore"):  # blank images: 0/0 is NaN, as promised
        row_mean, column_mean = by_row @ place / area, by_column @ place / area
        row_spread = by_row @ place**2 / area - row_mean**2
        together = np.einsum("nij,i,j->n", ink, place, place, optimize=True) / area
        slope = -(together - row_mean * column_mean) / row_spread  # rows count downwards
        down = np.diff(ink, axis=1, prepend=0, append=0)
        across = np.diff(ink, axis=2, prepend=0, append=0)
        # The length of the gradient, pixel by pixel, sums to the length of the outline.
        perimeter = np.hypot(down[:, :SIDE], across[:, :, :SIDE])
        stroke = 2 * area / perimeter.sum((1, 2), dtype=np.float64)
        blank = ~inked.any((1, 2))
        aspect = _extent(inked, 1) / _extent(inked, 2)
    slant = np.degrees(np.arctan(slope))
    for style in (slant, stroke, aspect):
        style[blank] = np.nan
    return {"slant": slant, "stroke width": stroke, "ink": area / SIDE**2, "aspect": aspect}


def _extent(inked: NDArray[np.bool_], axis: int) -> Floats:
    """Return the width (axis 1) or the height (axis 2) of the box around the True pixels."""
    touched = np.asarray(inked.any(axis))
    first, last = touched.argmax(1), SIDE - 1 - touched[:, ::-1].argmax(1)
    extent: Floats = (last - first + 1).astype(np.float64)
    return extent
