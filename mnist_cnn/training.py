"""Train the CNN on digits that are in memory."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from mnist_cnn.digits import Digits
from mnist_cnn.model import DigitCNN

Device = Literal["auto", "cuda", "mps", "cpu"]


class TrainingConfig(BaseModel, frozen=True, extra="forbid"):
    """How the CNN is trained. The defaults are production's."""

    epochs: int = Field(3, ge=1, le=1000, description="Passes over the training images.")
    batch_size: int = Field(256, ge=1, le=65536, description="Images a step.")
    learning_rate: float = Field(0.01, gt=0, le=10, description="Peak of the one-cycle schedule.")
    seed: int = Field(0, ge=0, description="Same seed, same machine: the same weights.")


@dataclass(frozen=True)
class EpochMetrics:
    """What one epoch of training was seen to do."""

    epoch: int
    loss: float
    """Mean cross entropy over the epoch's batches, nats."""
    accuracy: float
    """Share of the epoch's training images that were classified rightly as they went by."""
    images_per_second: float
    seconds_left: float


@dataclass(frozen=True)
class Training:
    """A finished training: the model in eval mode on the CPU, and how it went."""

    model: DigitCNN
    history: list[EpochMetrics]
    device: str
    seconds: float


def choose_device(requested: Device) -> torch.device:
    """Return the device to train on; `auto` takes cuda, else mps, else cpu.

    Raises ValueError if a device that was asked for by name is not there.
    """
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if requested == "auto":
        return torch.device(next(name for name, is_there in there.items() if is_there))
    if not there[requested]:
        found = ", ".join(name for name, is_there in there.items() if is_there)
        raise ValueError(
            f"device {requested!r} is not on this machine; found {found}: "
            "choose one of these or 'auto'"
        )
    return torch.device(requested)


def train(
    digits: Digits,
    config: TrainingConfig,
    device: Device = "auto",
    on_epoch: Callable[[EpochMetrics], None] = lambda _: None,
) -> Training:
    """Train a `DigitCNN` and call `on_epoch` after each epoch.

    Raises ValueError for fewer images than a batch, and FloatingPointError if the loss stops being
    finite.
    """
    if len(digits) < config.batch_size:
        raise ValueError(
            f"{len(digits)} training images are fewer than one batch of {config.batch_size}; "
            "lower training.batch_size or bring more images"
        )
    place = choose_device(device)
    torch.manual_seed(config.seed)
    model = DigitCNN().to(place, memory_format=torch.channels_last)
    images = torch.from_numpy(digits.images).to(place)
    labels = torch.from_numpy(digits.labels).to(place)
    steps = len(digits) // config.batch_size
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=steps * config.epochs
    )
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    order = torch.Generator().manual_seed(config.seed)
    history: list[EpochMetrics] = []
    start = time.perf_counter()
    for epoch in range(1, config.epochs + 1):
        began = time.perf_counter()
        losses: list[Tensor] = []
        right: list[Tensor] = []
        batches = torch.randperm(len(digits), generator=order).to(place)
        for batch in batches[: steps * config.batch_size].split(config.batch_size):
            logits = model(images[batch])
            loss = criterion(logits, labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
            right.append((logits.argmax(1) == labels[batch]).float().mean())
        metrics = _measure(epoch, config, losses, right, time.perf_counter() - began)
        history.append(metrics)
        on_epoch(metrics)
    return Training(model.cpu().eval(), history, str(place), time.perf_counter() - start)


def _measure(
    epoch: int, config: TrainingConfig, losses: list[Tensor], right: list[Tensor], seconds: float
) -> EpochMetrics:
    loss = float(torch.stack(losses).mean())
    if loss != loss:  # noqa: PLR0124 - the test for NaN
        raise FloatingPointError(
            f"the training loss is {loss} in epoch {epoch}; expected a finite number: "
            f"lower training.learning_rate ({config.learning_rate})"
        )
    return EpochMetrics(
        epoch=epoch,
        loss=loss,
        accuracy=float(torch.stack(right).mean()),
        images_per_second=len(losses) * config.batch_size / seconds,
        seconds_left=seconds * (config.epochs - epoch),
    )
