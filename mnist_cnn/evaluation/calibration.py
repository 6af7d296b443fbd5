"""Whether a model's confidence means what it says."""

import numpy as np
from numpy.typing import NDArray

from mnist_cnn.evaluation.figures import SURE, Calibration, Confidence, ReliabilityBin
from mnist_cnn.styles import Floats

BINS = 15
"""Equal bins of confidence, as in Guo et al. 2017, arXiv:1706.04599."""


def bin_of(confidence: Floats) -> NDArray[np.int64]:
    """Return the number of the bin, 0 to 14, of each confidence, 0 to 1."""
    return np.minimum((confidence * BINS).astype(np.int64), BINS - 1)


def brier_of(probabilities: Floats, labels: NDArray[np.int64]) -> Floats:
    """Return each image's squared distance from the truth, float64 (N,)."""
    truth = np.eye(probabilities.shape[1])[labels]
    distances: Floats = ((probabilities - truth) ** 2).sum(1)
    return distances


def calibrate(probabilities: Floats, labels: NDArray[np.int64]) -> Calibration:
    """Measure calibration from probabilities, float64 (N, 10), and labels, int64 (N,)."""
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    where = bin_of(confidence)
    bins = []
    for number in range(BINS):
        inside = where == number
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
    gaps = np.bincount(where, confidence - right, BINS)
    return Calibration(
        expected_error=float(np.abs(gaps).sum() / len(labels)),
        brier=float(brier_of(probabilities, labels).mean()),
        bins=bins,
    )


def measure_confidence(probabilities: Floats, labels: NDArray[np.int64]) -> Confidence:
    """Measure how confident the right and the wrong answers are."""
    from sklearn.metrics import roc_auc_score

    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    wrong = ~right
    return Confidence(
        errors=int(wrong.sum()),
        when_right=float(confidence[right].mean()) if right.any() else None,
        when_wrong=float(confidence[wrong].mean()) if wrong.any() else None,
        confident_errors=int((confidence[wrong] >= SURE).sum()),
        ranking=float(roc_auc_score(right, confidence)) if right.any() and wrong.any() else None,
    )
