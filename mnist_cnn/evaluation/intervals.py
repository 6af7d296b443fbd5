"""What images look like, how far two splits are apart, and how sure a figure is."""

import numpy as np
from numpy.typing import NDArray

from mnist_cnn.evaluation.figures import Interval
from mnist_cnn.styles import Floats


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
