"""What images look like, how far two splits are apart, and how sure a figure is."""

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from mnist_cnn.digits import CLASSES, SIDE, Digits

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


class Interval(BaseModel, frozen=True):
    """A 95 % confidence interval."""

    low: float
    high: float


class StyleShift(BaseModel, frozen=True):
    """One statistic of the images in the test split against the training split."""

    style: str
    unit: str
    training_mean: float
    test_mean: float
    difference: float
    """Test mean less training mean, in standard deviations of the training split."""
    distance: float
    """Kolmogorov-Smirnov distance of the two distributions, 0 (the same) to 1."""


class Shift(BaseModel, frozen=True):
    """How far the test split is from the training split."""

    training_labels: list[int]
    test_labels: list[int]
    label_distance: float
    """Total variation distance of the two label distributions, 0 to 1."""
    styles: list[StyleShift]


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


def measure_shift(training: Digits, test: Digits) -> Shift:
    """Return how far `test` is from `training`. Raises ValueError if either has no image."""
    for name, split in (("training", training), ("test", test)):
        if not len(split):
            raise ValueError(f"the {name} split has no images; expected some to compare")
    counts = [np.bincount(split.labels, minlength=CLASSES) for split in (training, test)]
    shares = [count / count.sum() for count in counts]
    before, after = measure_styles(training.images), measure_styles(test.images)
    return Shift(
        training_labels=counts[0].tolist(),
        test_labels=counts[1].tolist(),
        label_distance=float(np.abs(shares[0] - shares[1]).sum() / 2),
        styles=[
            _style_shift(style, _known(before[style]), _known(after[style])) for style in STYLES
        ],
    )


def _known(values: Floats) -> Floats:
    return values[np.isfinite(values)]


def _style_shift(style: str, before: Floats, after: Floats) -> StyleShift:
    if not len(before) or not len(after):
        raise ValueError(f"no image has a {style}: every image of a split is blank")
    every = np.sort(np.concatenate([before, after]))
    below = [np.searchsorted(np.sort(part), every, "right") / len(part) for part in (before, after)]
    spread = before.std()
    return StyleShift(
        style=style,
        unit=STYLES[style],
        training_mean=float(before.mean()),
        test_mean=float(after.mean()),
        difference=float((after.mean() - before.mean()) / spread) if spread else 0.0,
        distance=float(np.abs(below[0] - below[1]).max()),
    )


def wilson(right: int, images: int) -> Interval:
    """Return the interval of a share, which unlike the bootstrap's is honest at 0 and at 1.

    Source: Wilson 1927, doi:10.1080/01621459.1927.10502953.
    """
    z = 1.959964
    share = right / images
    middle = share + z**2 / (2 * images)
    half = z * np.sqrt(share * (1 - share) / images + z**2 / (4 * images**2))
    scale = 1 + z**2 / images
    return Interval(
        low=max(0.0, float((middle - half) / scale)), high=min(1.0, float((middle + half) / scale))
    )


def resample(images: int, resamples: int, seed: int) -> NDArray[np.float32]:
    """Return how often each image is in each bootstrap resample: float32 (resamples, images)."""
    dice = np.random.default_rng(seed)
    return np.stack(
        [
            np.bincount(dice.integers(images, size=images), minlength=images).astype(np.float32)
            for _ in range(resamples)
        ]
    )


def percentiles(samples: Floats) -> Interval:
    """Return the percentile interval of a statistic's bootstrap samples."""
    low, high = np.quantile(samples, [0.025, 0.975])
    return Interval(low=float(low), high=float(high))
