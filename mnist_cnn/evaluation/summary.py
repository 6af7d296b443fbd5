"""Figures of an evaluation, from the outcomes of one model on a test split."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from mnist_cnn.digits import CLASSES, Digits
from mnist_cnn.evaluation.calibration import BINS, bin_of, brier_of, calibrate, measure_confidence
from mnist_cnn.evaluation.corruptions import CORRUPTIONS
from mnist_cnn.evaluation.factors import reweight, score_conditions, slice_by_style
from mnist_cnn.evaluation.figures import (
    ClassMetrics,
    ConfusedPair,
    Evaluation,
    Intervals,
    ModelSize,
    Shift,
    Times,
)
from mnist_cnn.evaluation.intervals import percentiles, resample
from mnist_cnn.evaluation.outcomes import Outcomes
from mnist_cnn.styles import Floats, measure_styles

RESAMPLES = 1000
"""Bootstrap resamples of the test images."""


def evaluate(
    measured: Outcomes,
    digits: Digits,
    *,
    model: str,
    snapshot: str,
    outcomes: str,
    shift: Shift | None = None,
    size: ModelSize | None = None,
    times: Times | None = None,
) -> Evaluation:
    """Summarise outcomes; a pure function, so that equal outcomes give an equal report.

    `model` and `outcomes` are addresses and `snapshot` is a digest; they are passed through, as are
    `shift`, `size` and `times`. Raises ValueError if the outcomes belong to another number of
    images.
    """
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    labels = digits.labels  # (N,)
    if len(measured.probabilities) != len(labels):
        raise ValueError(
            f"there are outcomes of {len(measured.probabilities)} images but {len(labels)} labels; "
            "expected those of one test split: measure the model again"
        )
    probabilities = measured.probabilities.astype(np.float64)  # (N, 10)
    predicted = probabilities.argmax(1)  # (N,)
    confusion = confusion_matrix(labels, predicted, labels=range(CLASSES))  # (10, 10)
    precision, recall, f1, support = precision_recall_fscore_support(
        labels, predicted, labels=range(CLASSES), zero_division=np.nan
    )
    # A probability can be 0 in float32; the smallest normal number keeps its loss finite.
    losses = -np.log(
        np.maximum(probabilities[np.arange(len(labels)), labels], np.finfo(np.float32).tiny)
    )
    styles = measure_styles(digits.images)
    return Evaluation(
        model=model,
        snapshot=snapshot,
        outcomes=outcomes,
        images=len(labels),
        seed=measured.seed,
        accuracy=float((predicted == labels).mean()),
        loss=float(losses.mean()),
        macro_f1=float(f1[support > 0].mean()),
        intervals=_bootstrap(probabilities, labels, losses, measured.seed),
        classes=[
            ClassMetrics(
                digit=digit,
                precision=_known(precision[digit]),
                recall=_known(recall[digit]),
                f1=_known(f1[digit]) if support[digit] else None,
                support=int(support[digit]),
            )
            for digit in range(CLASSES)
        ],
        confusion=confusion.tolist(),
        confused=_most_confused(confusion),
        conditions=score_conditions(CORRUPTIONS, measured.predictions, measured.gaps, labels),
        slices=slice_by_style(styles, predicted == labels),
        shift=shift,
        priors=reweight(confusion, shift),
        calibration=calibrate(probabilities, labels),
        confidence=measure_confidence(probabilities, labels),
        size=size,
        times=times,
        gaps=_gaps(measured, support, styles),
    )


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _most_confused(confusion: NDArray[np.int64], most: int = 10) -> list[ConfusedPair]:
    pairs = [
        ConfusedPair(true=true, predicted=predicted, images=int(confusion[true, predicted]))
        for true in range(CLASSES)
        for predicted in range(CLASSES)
        if true != predicted and confusion[true, predicted]
    ]
    return sorted(pairs, key=lambda pair: -pair.images)[:most]


def _gaps(
    measured: Outcomes, support: NDArray[np.int64], styles: Mapping[str, Floats]
) -> list[str]:
    absent = [
        f"no test image shows {digit}: its recall and F1 are unknown"
        for digit in range(CLASSES)
        if not support[digit]
    ]
    # Every style but ink is NaN for a blank image, so slant finds them all.
    blank = int((~np.isfinite(styles["slant"])).sum())
    unstyled = [f"{blank} test images are blank and belong to no style"] if blank else []
    return absent + unstyled + [f"{under}: {why}" for under, why in measured.gaps.items()]


def _bootstrap(
    probabilities: Floats, labels: NDArray[np.int64], losses: Floats, seed: int
) -> Intervals:
    """Return the percentile bootstrap intervals of the figures."""
    # Every figure is a function of sums over the images. So the summands stand side by side as
    # columns, one row an image, and one product with the counts gives the sums of all resamples.
    predicted = probabilities.argmax(1)  # (N,)
    confidence = probabilities.max(1)  # (N,)
    right = predicted == labels  # (N,)
    digit = np.eye(CLASSES)
    excess = (confidence - right)[:, None] * np.eye(BINS)[bin_of(confidence)]  # (N, 15)
    columns = [
        right[:, None],  # (N, 1)
        losses[:, None],  # (N, 1)
        brier_of(probabilities, labels)[:, None],  # (N, 1)
        digit[labels] * right[:, None],  # (N, 10), hits
        digit[labels],  # (N, 10)
        digit[predicted],  # (N, 10)
        excess,
    ]
    summands = np.hstack(columns).astype(np.float32)  # (N, 48)
    sums = resample(len(labels), RESAMPLES, seed) @ summands  # (1000, 48)
    means = sums.astype(np.float64) / len(labels)
    hit, true, guessed = np.split(means[:, 3 : 3 + 3 * CLASSES], 3, axis=1)  # (1000, 10) each
    with np.errstate(invalid="ignore"):  # a digit that is not in a resample has no F1
        f1 = np.where(true > 0, 2 * hit / (true + guessed), np.nan)
    return Intervals(
        resamples=RESAMPLES,
        accuracy=percentiles(means[:, 0]),
        macro_f1=percentiles(np.nanmean(f1, axis=1)),
        loss=percentiles(means[:, 1]),
        brier=percentiles(means[:, 2]),
        expected_error=percentiles(np.abs(means[:, -BINS:]).sum(1)),
    )
