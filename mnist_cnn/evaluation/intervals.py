"""Confidence intervals of 95 %: Wilson's for a share, the percentile bootstrap for the rest."""

import numpy as np
from numpy.typing import NDArray

from mnist_cnn.evaluation.figures import Interval
from mnist_cnn.styles import Floats


def wilson(right: int, images: int) -> Interval:
    """Return the interval of the share `right` / `images`.

    Unlike the bootstrap's it keeps a width where the share is 0 or 1.
    Source: Wilson 1927, doi:10.1080/01621459.1927.10502953.
    """
    from scipy.stats import binomtest

    low, high = binomtest(right, images).proportion_ci(method="wilson")
    return Interval(low=float(low), high=float(high))


def resample(images: int, resamples: int, seed: int) -> NDArray[np.float32]:
    """Return the count of each image in each bootstrap resample, float32 (resamples, images)."""
    rng = np.random.default_rng(seed)
    # Counts instead of indices: the sums of all resamples are then one matrix product.
    return np.stack(
        [
            np.bincount(rng.integers(images, size=images), minlength=images).astype(np.float32)
            for _ in range(resamples)
        ]
    )


def percentiles(samples: Floats) -> Interval:
    """Return the 95 % percentile interval of a statistic's bootstrap samples, (resamples,)."""
    low, high = np.quantile(samples, [0.025, 0.975])
    return Interval(low=float(low), high=float(high))
