"""The figures of an evaluation: one model on the test split of one snapshot."""

from typing import Literal

from pydantic import BaseModel

from mnist_cnn.record import Record


class Interval(BaseModel, frozen=True):
    """A 95 % confidence interval."""

    low: float
    high: float


Factor = Literal["handwriting style", "noise level", "image quality"]


class ConditionResult(BaseModel, frozen=True):
    """Accuracy under one corruption at one strength, or the reason for its absence."""

    corruption: str
    factor: Factor
    unit: str
    strength: float
    accuracy: float | None
    interval: Interval | None
    gap: str | None = None
    """Reason for a missing accuracy; None where there is one."""


class Slice(BaseModel, frozen=True):
    """Accuracy on the test images whose style lies in one part of its range."""

    style: str
    unit: str
    low: float
    high: float
    images: int
    accuracy: float
    interval: Interval


class PriorResult(BaseModel, frozen=True):
    """Accuracy under other label priors than the test split's."""

    name: str
    priors: list[float]
    accuracy: float | None
    gap: str | None = None
    """Reason for a missing accuracy; None where there is one."""


class PriorShift(BaseModel, frozen=True):
    """Accuracy under shifted label priors."""

    scenarios: list[PriorResult]
    radius: float
    """Total variation distance from the test split's priors, 0 to 1."""
    worst: PriorResult
    """Priors within the radius that give the lowest accuracy, and this accuracy."""


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
    """Distance of the test split from the training split."""

    training_labels: list[int]
    """Images of each digit, 0 to 9."""
    test_labels: list[int]
    label_distance: float
    """Total variation distance of the two label distributions, 0 to 1."""
    styles: list[StyleShift]


SURE = 0.9
"""Confidence from which an error counts as a confident one."""


class ReliabilityBin(BaseModel, frozen=True):
    """The images whose confidence lies in one bin; None where there is no such image."""

    low: float
    high: float
    images: int
    confidence: float | None
    accuracy: float | None


class Calibration(BaseModel, frozen=True):
    """Confidence against accuracy."""

    expected_error: float
    """Mean gap between confidence and accuracy over the bins, weighted by images, 0 to 1."""
    brier: float
    """Mean squared distance of the ten probabilities from the truth, 0 to 2 (Brier 1950)."""
    bins: list[ReliabilityBin]


class Confidence(BaseModel, frozen=True):
    """Confidence of correct and of wrong predictions; None where there are none of the kind."""

    errors: int
    when_right: float | None
    """Mean confidence of the correct predictions."""
    when_wrong: float | None
    """Mean confidence of the wrong predictions."""
    confident_errors: int
    """Errors made with a confidence of at least `SURE`."""
    ranking: float | None
    """Chance that a correct prediction has a higher confidence than a wrong one (area under the ROC
    curve)."""


class ModelSize(BaseModel, frozen=True):
    """Size of a model."""

    parameters: int
    multiply_accumulates: int
    """For one image; convolutions and matrix products, by torch's flop counter."""
    file_bytes: int | None
    """Size of the stored model; None where it was not stored."""


class Times(BaseModel, frozen=True):
    """Speed of a model on this machine: the only figures that a repeated evaluation changes."""

    device: str
    threads: int
    single_image_ms: float
    """Median time of one image, milliseconds."""
    single_image_p95_ms: float
    """95th percentile, likewise."""
    batch_size: int
    batch_images_per_second: float
    """From the median time of a batch."""
    scoring_seconds: float
    """Time of the model on the clean and all corrupted images."""


class ClassMetrics(BaseModel, frozen=True):
    """Precision, recall and F1 of one digit, each 0 to 1, and its number of images.

    None is a gap: recall where no image shows the digit, precision where it was never predicted.
    """

    digit: int
    precision: float | None
    recall: float | None
    f1: float | None
    support: int


class ConfusedPair(BaseModel, frozen=True):
    """Number of images of one digit that were predicted as another."""

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


class Evaluation(Record):
    """One model on the test split of one snapshot."""

    model: str
    """Address of the model in MLflow."""
    snapshot: str
    """Digest of the snapshot whose test split was measured."""
    outcomes: str
    """Address of the outcomes of every image."""
    images: int
    seed: int
    """Seed of the corruptions and of the bootstrap."""
    accuracy: float
    loss: float
    """Mean cross entropy, nats."""
    macro_f1: float
    """Mean F1 of the digits that have test images."""
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
    """Missing measurements, one sentence each."""
