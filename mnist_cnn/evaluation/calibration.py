"""Calibration: the confidence of a model against its accuracy."""

import numpy as np
from numpy.typing import NDArray

from mnist_cnn.evaluation.figures import SURE, Calibration, Confidence, ReliabilityBin
from mnist_cnn.styles import Floats

BINS = 15
"""Equal bins of confidence, as in Guo et al. 2017, arXiv:1706.04599."""


def bin_of(confidence: Floats) -> NDArray[np.int64]:
    """Return the bin, 0 to 14, of each confidence, 0 to 1."""
    # The last bin holds its upper end too: a confidence of exactly 1 has no bin above it.
    return np.minimum((confidence * BINS).astype(np.int64), BINS - 1)


def brier_of(probabilities: Floats, labels: NDArray[np.int64]) -> Floats:
    """Return each image's squared distance from the truth, float64 (N,), 0 to 2."""
    truth = np.eye(probabilities.shape[1])[labels]  # (N, 10)
    distances: Floats = ((probabilities - truth) ** 2).sum(1)  # (N,)
    return distances


def calibrate(probabilities: Floats, labels: NDArray[np.int64]) -> Calibration:
    """Measure calibration from probabilities, float64 (N, 10), and labels, int64 (N,)."""
    confidence = probabilities.max(1)  # (N,)
    right = probabilities.argmax(1) == labels  # (N,)
    bin_number = bin_of(confidence)  # (N,)
    bins = []
    for number in range(BINS):
        inside = bin_number == number
        some = bool(inside.any())
        bins.append(
            ReliabilityBin(
                low=number / BINS,
                high=(number + 1) / BINS,
                images=int(inside.sum()),
                confidence=float(confidence[inside].mean()) if some else None,
                accuracy=float(right[inside].mean()) if some else None,
            )
        )
    # A bin's sum of (confidence - right) is its gap times its number of images, so the mean gap
    # weighted by images needs no division by bin, and an empty bin adds 0.
    gaps = np.bincount(bin_number, confidence - right, BINS)  # (15,)
    return Calibration(
        expected_error=float(np.abs(gaps).sum() / len(labels)),
        brier=float(brier_of(probabilities, labels).mean()),
        bins=bins,
    )


def measure_confidence(probabilities: Floats, labels: NDArray[np.int64]) -> Confidence:
    """Measure the confidence of the correct and of the wrong predictions.

    `probabilities` is float64 (N, 10), `labels` int64 (N,).
    """
    from sklearn.metrics import roc_auc_score

    confidence = probabilities.max(1)  # (N,)
    right = probabilities.argmax(1) == labels  # (N,)
    wrong = ~right
    return Confidence(
        errors=int(wrong.sum()),
        when_right=float(confidence[right].mean()) if right.any() else None,
        when_wrong=float(confidence[wrong].mean()) if wrong.any() else None,
        confident_errors=int((confidence[wrong] >= SURE).sum()),
        # The area under the ROC curve is defined only where both classes occur.
        ranking=float(roc_auc_score(right, confidence)) if right.any() and wrong.any() else None,
    )
