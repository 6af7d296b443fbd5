"""Outcomes of models on a test split: one prediction for each image and condition."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mnist_cnn.digits import CLASSES, SIDE, Digits
from mnist_cnn.evaluation.corruptions import BATCH, CORRUPTIONS, Corruption, condition, corrupted
from mnist_cnn.evaluation.cost import device_of


@dataclass(frozen=True, eq=False)
class Outcomes:
    """Predictions of one model for every test image, clean and corrupted."""

    probabilities: NDArray[np.float32]
    """Of the ten digits for the clean images, (N, 10)."""
    predictions: Mapping[str, NDArray[np.uint8]]
    """Predicted digits (N,) under each condition, such as `slant=-15`."""
    gaps: Mapping[str, str] = field(default_factory=dict)
    """Conditions that could not be measured, each with the reason."""
    seconds: float = 0.0
    """Time of the model on all of these images."""
    seed: int = 0
    """Seed of the corruptions."""

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """Return the arrays to store, by name, as `numpy.savez_compressed` takes them."""
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
        logits = torch.cat([_logits(model, batch) for batch in batches])  # (N, 10)
    probabilities: NDArray[np.float32] = logits.softmax(1).cpu().numpy()
    return probabilities


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    """Return finite logits (N, 10) of uint8 (N, 28, 28); raise ValueError otherwise."""
    try:
        logits: Tensor = model(images)
    except Exception as error:  # a stored model can raise any exception; the first line is kept
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
    """Classify every clean and corrupted test image with `model`; see `measure_all`."""
    return measure_all({"the model": model}, digits, seed)["the model"]


def measure_all(
    models: Mapping[str, nn.Module],
    digits: Digits,
    seed: int = 0,
    corruptions: tuple[Corruption, ...] = CORRUPTIONS,
) -> dict[str, Outcomes]:
    """Classify the very same images with each model; each batch is corrupted only once.

    Raises ValueError for a split without images and for a model that fails on the clean images. A
    corruption that fails, and a model that fails under one, becomes a gap of the outcomes.
    """
    if not len(digits):
        raise ValueError("the test split is empty; nothing can be measured")
    # The images are corrupted on the first model's device, and moved if another model is elsewhere.
    device = device_of(next(iter(models.values())))
    images = torch.tensor(digits.images, device=device)  # (N, 28, 28)
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
            batches = corrupted(images, corruption, strength, seed)
            found = _classify(models, batches, seconds)
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
    """Return each model's predicted digits, uint8 (N,), or the reason for having none.

    Each model's time is added to its `seconds`.
    """
    predicted: dict[str, list[Tensor]] = {name: [] for name in models}
    failed: dict[str, NDArray[np.uint8] | str] = {}
    try:
        for batch in batches:  # (500, 28, 28) or fewer
            # A model that failed once is left out of the remaining batches.
            for name in models.keys() - failed.keys():
                start = time.perf_counter()
                try:
                    logits = _logits(models[name], batch.to(device_of(models[name])))
                    # The copy waits for the device, so the clock stops after the work.
                    predicted[name].append(logits.argmax(1).to("cpu", torch.uint8))
                except ValueError as error:
                    failed[name] = str(error)
                seconds[name] += time.perf_counter() - start
    except Exception as error:  # noqa: BLE001 - one corruption must not cost the others
        return dict.fromkeys(models, f"the corruption failed with {error!r}")
    # The right side wins: predictions from before a model's failure are dropped.
    return {name: torch.cat(parts).numpy() for name, parts in predicted.items() if parts} | failed
