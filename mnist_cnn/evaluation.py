"""Measure models on a test split: first every image's outcome, then figures from the outcomes."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel
from torch import Tensor, nn

from mnist_cnn.calibration import (
    BINS,
    Calibration,
    Confidence,
    bin_of,
    brier_of,
    calibrate,
    measure_confidence,
)
from mnist_cnn.corruptions import BATCH, CORRUPTIONS, Corruption, condition, corrupted
from mnist_cnn.cost import ModelSize, Times, device_of
from mnist_cnn.digits import CLASSES, SIDE, Digits
from mnist_cnn.factors import (
    ConditionResult,
    PriorShift,
    Slice,
    reweight,
    score_conditions,
    slice_by_style,
)
from mnist_cnn.statistics import (
    Floats,
    Interval,
    Shift,
    measure_styles,
    percentiles,
    resample,
)

RESAMPLES = 1000
"""Bootstrap resamples of the test images."""


class ClassMetrics(BaseModel, frozen=True):
    """Precision, recall and F1 of one digit, each 0 to 1, and how many images show it.

    None is a gap: recall where no image shows the digit, precision where it was never predicted.
    """

    digit: int
    precision: float | None
    recall: float | None
    f1: float | None
    support: int


class ConfusedPair(BaseModel, frozen=True):
    """How often one digit was taken for another."""

    true: int
    predicted: int
    images: int


class Intervals(BaseModel, frozen=True):
    """95 % intervals from resampling the test images (percentile bootstrap, Efron 1979)."""

    resamples: int
    accuracy: Interval
    macro_f1: Interval
    loss: Interval
    brier: Interval
    expected_error: Interval


class Evaluation(BaseModel, frozen=True):
    """One model on the test split of one snapshot."""

    model: str
    """Address of the model in MLflow."""
    snapshot: str
    """Digest of the snapshot whose test split was measured."""
    outcomes: str
    """Address of the outcome of every image."""
    images: int
    seed: int
    """Seed of the corruptions and of the bootstrap."""
    accuracy: float
    loss: float
    """Mean cross entropy, nats."""
    macro_f1: float
    """Mean F1 of the digits that test images show."""
    intervals: Intervals
    classes: list[ClassMetrics]
    confusion: list[list[int]]
    """Images by true digit (row) and predicted digit (column)."""
    confused: list[ConfusedPair]
    """The most confused pairs, most frequent first."""
    conditions: list[ConditionResult]
    slices: list[Slice]
    shift: Shift | None
    """Test split against training split; None where no training split was given."""
    priors: PriorShift
    calibration: Calibration
    confidence: Confidence
    size: ModelSize | None
    times: Times | None
    gaps: list[str]
    """What could not be measured, one sentence each."""


@dataclass(frozen=True, eq=False)
class Outcomes:
    """What one model said to every test image, clean and corrupted."""

    probabilities: NDArray[np.float32]
    """Of the ten digits for the clean images, (N, 10)."""
    predictions: Mapping[str, NDArray[np.uint8]]
    """Predicted digits (N,) under each condition, such as `slant=-15`."""
    gaps: Mapping[str, str] = field(default_factory=dict)
    """Conditions that could not be measured, and why."""
    seconds: float = 0.0
    """Time that the model spent on all of these images."""
    seed: int = 0

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """Return what to store, by name; `numpy.savez_compressed` takes it as it is."""
        return {"probabilities": self.probabilities, **self.predictions}


def predict(
    model: nn.Module, images: NDArray[np.uint8], batch_size: int = BATCH
) -> NDArray[np.float32]:
    """Return the probabilities, float32 (N, 10), that `model` gives to uint8 (N, 28, 28).

    Raises ValueError if the model does not take such images, or if its output has another shape or
    is not finite.
    """
    batches = torch.split(torch.tensor(images, device=device_of(model)), batch_size)
    with torch.inference_mode():
        logits = torch.cat([_logits(model, batch) for batch in batches])
    probabilities: NDArray[np.float32] = logits.softmax(1).cpu().numpy()
    return probabilities


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    try:
        logits: Tensor = model(images)
    except Exception as error:  # a stored model can raise anything; it is named, and goes on
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"the model failed on uint8 images of {SIDE} x {SIDE} ({reason}); "
            f"expected a module that maps uint8 (N, {SIDE}, {SIDE}) to logits (N, {CLASSES}): "
            "it was made for other data, or the machine ran out of memory"
        ) from error
    if logits.shape != (len(images), CLASSES):
        raise ValueError(
            f"the model returned {tuple(logits.shape)} for {len(images)} images; "
            f"expected ({len(images)}, {CLASSES}): it was made for other data"
        )
    if not bool(logits.isfinite().all()):
        broken = int((~logits.isfinite()).any(1).sum())
        raise ValueError(
            f"the model returned NaN or infinity for {broken} of {len(images)} images; "
            "it is unusable on them"
        )
    return logits


def measure(model: nn.Module, digits: Digits, seed: int = 0) -> Outcomes:
    """Return what `model` says to every clean and corrupted test image; see `measure_all`."""
    return measure_all({"the model": model}, digits, seed)["the model"]


def measure_all(
    models: Mapping[str, nn.Module],
    digits: Digits,
    seed: int = 0,
    corruptions: tuple[Corruption, ...] = CORRUPTIONS,
) -> dict[str, Outcomes]:
    """Return what each model says to the very same images; each batch is corrupted only once.

    Raises ValueError for a split without images and for a model that fails on the clean images. A
    corruption that fails, and a model that fails under one, becomes a gap of the outcomes.
    """
    if not len(digits):
        raise ValueError("the test split is empty; nothing can be measured")
    device = device_of(next(iter(models.values())))
    images = torch.tensor(digits.images, device=device)
    seconds = dict.fromkeys(models, 0.0)
    gaps: dict[str, dict[str, str]] = {name: {} for name in models}
    predictions: dict[str, dict[str, NDArray[np.uint8]]] = {name: {} for name in models}
    probabilities = {}
    for name, model in models.items():
        start = time.perf_counter()
        try:
            probabilities[name] = predict(model, digits.images)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        seconds[name] += time.perf_counter() - start
    for corruption in corruptions:
        for strength in corruption.strengths:
            under = condition(corruption, strength)
            found = _classify(models, corrupted(images, corruption, strength, seed), seconds)
            for name, outcome in found.items():
                if isinstance(outcome, str):
                    gaps[name][under] = outcome
                else:
                    predictions[name][under] = outcome
    return {
        name: Outcomes(probabilities[name], predictions[name], gaps[name], seconds[name], seed)
        for name in models
    }


def _classify(
    models: Mapping[str, nn.Module], batches: Iterable[Tensor], seconds: dict[str, float]
) -> dict[str, NDArray[np.uint8] | str]:
    """Return each model's predicted digits, or why there are none; add to its `seconds`."""
    predicted: dict[str, list[Tensor]] = {name: [] for name in models}
    failed: dict[str, NDArray[np.uint8] | str] = {}
    try:
        for batch in batches:
            for name in models.keys() - failed.keys():
                start = time.perf_counter()
                try:
                    logits = _logits(models[name], batch.to(device_of(models[name])))
                    predicted[name].append(logits.argmax(1).to("cpu", torch.uint8))
                except ValueError as error:
                    failed[name] = str(error)
                seconds[name] += time.perf_counter() - start
    except Exception as error:  # noqa: BLE001 - one corruption must not cost the others
        return dict.fromkeys(models, f"the corruption failed with {error!r}")
    return {name: torch.cat(parts).numpy() for name, parts in predicted.items() if parts} | failed


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

    `model`, `snapshot` and `outcomes` are the addresses to carry along. Raises ValueError if the
    outcomes belong to another number of images.
    """
    from sklearn.metrics import (  # noqa: PLC0415 - 1.8 s to import
        confusion_matrix,
        precision_recall_fscore_support,
    )

    labels = digits.labels
    if len(measured.probabilities) != len(labels):
        raise ValueError(
            f"there are outcomes of {len(measured.probabilities)} images but {len(labels)} labels; "
            "expected those of one test split: measure the model again"
        )
    probabilities = measured.probabilities.astype(np.float64)
    predicted = probabilities.argmax(1)
    confusion = confusion_matrix(labels, predicted, labels=range(CLASSES))
    precision, recall, f1, support = precision_recall_fscore_support(
        labels, predicted, labels=range(CLASSES), zero_division=np.nan
    )
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
    blank = int((~np.isfinite(styles["slant"])).sum())
    unstyled = [f"{blank} test images are blank and belong to no style"] if blank else []
    return absent + unstyled + [f"{under}: {why}" for under, why in measured.gaps.items()]


def _bootstrap(
    probabilities: Floats, labels: NDArray[np.int64], losses: Floats, seed: int
) -> Intervals:
    """Resample the images; every statistic is a function of sums over them, so of one product."""
    predicted = probabilities.argmax(1)
    digit, right = np.eye(CLASSES), predicted == labels
    excess = (probabilities.max(1) - right)[:, None] * np.eye(BINS)[bin_of(probabilities.max(1))]
    columns = [
        right[:, None],
        losses[:, None],
        brier_of(probabilities, labels)[:, None],
        digit[labels] * right[:, None],
        digit[labels],
        digit[predicted],
        excess,
    ]
    sums = resample(len(labels), RESAMPLES, seed) @ np.hstack(columns).astype(np.float32)
    means = sums.astype(np.float64) / len(labels)
    hit, true, guessed = np.split(means[:, 3 : 3 + 3 * CLASSES], 3, axis=1)
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
