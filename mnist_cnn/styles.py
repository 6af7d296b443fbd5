"""The styles of handwriting, measured on each image: slant, stroke width, ink, aspect."""

from dataclasses import dataclass

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


INK = 128
"""Least brightness of a pixel that counts as ink."""


@dataclass(frozen=True)
class Strokes:
    """The strokes of images, each float64 (N,) and finite, of a blank image too."""

    ink: Floats
    """Share of the pixels of `INK` and more."""
    centre_x: Floats
    """Centre of mass of all brightness, pixels from the left."""
    centre_y: Floats
    """Likewise, pixels from the top."""
    shear: Floats
    """Pixels to the right for each pixel upwards."""
    width: Floats
    """Pixels."""
    length: Floats
    """Pixels."""


def measure_styles(images: NDArray[np.uint8], batch_size: int = 1000) -> dict[str, Floats]:
    """Return each statistic of `STYLES` for uint8 (N, 28, 28), as float64 (N,).

    Aspect is that of the box around the ink. An image without ink has NaN for all but the ink.
    """
    parts = [
        _styles_of(images[first : first + batch_size])
        for first in range(0, max(len(images), 1), batch_size)
    ]
    return {style: np.concatenate([part[style] for part in parts]) for style in STYLES}


def measure_strokes(images: NDArray[np.uint8]) -> Strokes:
    """Measure the strokes of uint8 (N, 28, 28)."""
    pixels = images.reshape(len(images), SIDE * SIDE).astype(np.float32)  # (N, 784)
    # All moments are sums over pixels: one matrix product with a column of weights each.
    total, x, y, xy, yy = (pixels @ _MOMENTS).T.astype(np.float64)  # each (N,)
    mass = np.maximum(total, 1)  # (N,), never 0: a black image has its centre in the middle
    mean_x = x / mass  # (N,)
    mean_y = y / mass  # (N,)
    spread = np.maximum(yy / mass - mean_y**2, 1e-3)  # (N,), 0 for ink in a single row
    # Stroke length comes from the outline: the pixel edges between ink and background, counted as
    # neighbours that differ, down the columns and along the rows.
    ink = images >= INK  # (N, 28, 28)
    area = np.count_nonzero(ink, axis=(1, 2))  # (N,)
    outline = np.count_nonzero(ink[:, 1:] ^ ink[:, :-1], axis=(1, 2))  # (N, 27, 28) -> (N,)
    outline += np.count_nonzero(ink[:, :, 1:] ^ ink[:, :, :-1], axis=(1, 2))  # (N, 28, 27) -> (N,)
    # A stroke's outline is twice its length. A diagonal outline crosses more pixel edges, by 4/pi
    # on average over all directions.
    length = outline * (np.pi / 8)  # (N,)
    return Strokes(
        ink=area / SIDE**2,
        centre_x=mean_x + (SIDE - 1) / 2,
        centre_y=mean_y + (SIDE - 1) / 2,
        # Shear is the covariance of x and y over the variance of y. Rows count downwards, so that
        # a top that leans right has a negative covariance.
        shear=-(xy / mass - mean_x * mean_y) / spread,
        width=area / np.maximum(length, 0.5),
        length=length,
    )


def _moments() -> NDArray[np.float32]:
    """Return the weights (784, 5) of the sums over pixels: 1, x, y, xy, yy."""
    y, x = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2  # (28, 28) each, 0 in the middle
    weights = [np.ones_like(x), x, y, x * y, y * y]  # 5 of (28, 28)
    return np.stack([weight.ravel() for weight in weights], axis=1).astype(np.float32)


_MOMENTS = _moments()


def _styles_of(images: NDArray[np.uint8]) -> dict[str, Floats]:
    strokes = measure_strokes(images)
    ink = np.asarray(images >= INK)  # (N, 28, 28)
    styles = {
        "slant": np.degrees(np.arctan(strokes.shear)),
        "stroke width": strokes.width,
        "ink": strokes.ink,
        "aspect": _extent(ink, 1) / _extent(ink, 2),
    }
    blank = strokes.ink == 0  # (N,)
    return {
        style: values if style == "ink" else np.where(blank, np.nan, values)
        for style, values in styles.items()
    }


def _extent(inked: NDArray[np.bool_], axis: int) -> Floats:
    """Return the width (axis 1) or the height (axis 2) of the box around the True pixels."""
    touched = np.asarray(inked.any(axis))
    first, last = touched.argmax(1), SIDE - 1 - touched[:, ::-1].argmax(1)
    extent: Floats = (last - first + 1).astype(np.float64)
    return extent
