"""Measure a model on a test split: first every image's outcome, then figures from the outcomes."""

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel
from torch import nn

from mnist_cnn.digits import CLASSES, Digits


class ClassMetrics(BaseModel, frozen=True):
    """Precision, recall and F1 of one digit, each 0 to 1, and how many images show it."""

    digit: int
    precision: float
    recall: float
    f1: float
    support: int


class Evaluation(BaseModel, frozen=True):
    """One model on the test split of one snapshot."""

    model: str
    """Address of the model in MLflow."""
    snapshot: str
    """Digest of the snapshot whose test split was measured."""
    images: int
    accuracy: float
    loss: float
    """Mean cross entropy, nats."""
    macro_f1: float
    classes: list[ClassMetrics]
    outcomes: str
    """Address of the outcome of every image."""


def predict(
    model: nn.Module, images: NDArray[np.uint8], batch_size: int = 1000
) -> NDArray[np.float32]:
    """Return the probabilities, float32 (N, 10), that `model` gives to uint8 (N, 28, 28).

    Raises ValueError if the model's output has another shape or is not finite.
    """
    with torch.inference_mode():
        logits = torch.cat([model(part) for part in torch.from_numpy(images).split(batch_size)])
    if logits.shape != (len(images), CLASSES):
        raise ValueError(
            f"the model returned {tuple(logits.shape)} for {len(images)} images; "
            f"expected ({len(images)}, {CLASSES}): it was made for other data"
        )
    if not bool(logits.isfinite().all()):
        broken = int((~logits.isfinite()).any(1).sum())
        raise ValueError(f"the model returned NaN or infinity for {broken} images; it is unusable")
    probabilities: NDArray[np.float32] = logits.softmax(1).numpy()
    return probabilities


def evaluate(
    probabilities: NDArray[np.float32], digits: Digits, *, model: str, snapshot: str, outcomes: str
) -> Evaluation:
    """Summarise outcomes; `model`, `snapshot` and `outcomes` are the addresses to carry along.

    Raises ValueError for a split without images.
    """
    if not len(digits):
        raise ValueError(f"the test split of snapshot {snapshot} is empty; nothing can be measured")
    from sklearn.metrics import precision_recall_fscore_support  # noqa: PLC0415 - 1.8 s to import

    predicted = probabilities.argmax(1)
    of_truth = probabilities[np.arange(len(digits)), digits.labels]
    precision, recall, f1, support = precision_recall_fscore_support(
        digits.labels, predicted, labels=range(CLASSES), zero_division=np.nan
    )
    return Evaluation(
        model=model,
        snapshot=snapshot,
        images=len(digits),
        accuracy=float((predicted == digits.labels).mean()),
        loss=float(-np.log(np.maximum(of_truth, np.finfo(np.float32).tiny)).mean()),
        macro_f1=float(np.nanmean(f1)),
        classes=[
            ClassMetrics(digit=digit, precision=p, recall=r, f1=f, support=n)
            for digit, (p, r, f, n) in enumerate(zip(precision, recall, f1, support, strict=True))
        ],
        outcomes=outcomes,
    )
