"""Train the CNN on digits that are in memory: fast, repeatable, and resumable at any step."""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, distributed

from mnist_cnn.device import Device, choose_device, determinism, kept_memory
from mnist_cnn.digits import CLASSES, Digits
from mnist_cnn.model import DigitCNN
from mnist_cnn.training.checkpoint import Checkpoint, CheckpointStore, Writer, newest_valid
from mnist_cnn.training.learner import Learner
from mnist_cnn.training.loader import Batches
from mnist_cnn.training.recipe import RECIPES, Preset, Recipe, TrainingConfig

__all__ = [
    "RECIPES",
    "AccuracyCollapsed",
    "Device",
    "EpochMetrics",
    "Outcome",
    "Preset",
    "Progress",
    "Recipe",
    "Training",
    "TrainingConfig",
    "TrainingStopped",
    "choose_device",
    "train",
]

Outcome = Literal["finished", "early stop", "time budget"]

_SECONDS_BETWEEN_PROGRESS = 1.0
# An epoch with less than this share of the best epoch's accuracy has collapsed, and a training that
# ends with less than twice the accuracy of guessing has learnt nothing.
_COLLAPSE, _GUESSING = 0.5, 1 / CLASSES


@dataclass(frozen=True)
class Progress:
    """Where a training is, told about once a second."""

    step: int
    steps: int
    """The step after which it ends."""
    images_per_second: float
    seconds_left: float


@dataclass(frozen=True)
class EpochMetrics:
    """What one epoch of training was seen to do; the last epoch may be a part of one."""

    epoch: int
    step: int
    """Optimizer steps taken when it ended."""
    loss: float
    """Mean cross entropy against the smoothed labels over the epoch's images, nats."""
    accuracy: float
    """Share of the images shown that were classified rightly as they went by; after the first
    epoch those are the hard ones, several times."""
    validation_loss: float | None
    """Mean cross entropy of the images set aside, nats; None if there are none."""
    validation_accuracy: float | None
    images_per_second: float
    seconds_left: float


@dataclass(frozen=True)
class Training:
    """A finished training: the model in eval mode on the CPU, and how it went."""

    model: DigitCNN
    history: list[EpochMetrics]
    device: str
    seconds: float
    """Spent training, those before a resumption included."""
    warmup_seconds: float
    """Spent before that on compiling and warming up, by this call alone."""
    outcome: Outcome
    steps: int
    resumed_from: int | None
    """The step of the checkpoint that it went on from; None if it began at the beginning."""
    micro_batch: int
    precision: str
    warnings: list[str]
    """Sentences: checkpoints that were refused or could not be written, memory that ran out."""


class TrainingStopped(RuntimeError):
    """Training was asked to stop and can be gone on with; the message says from where."""

    def __init__(self, reason: str, step: int, steps: int, *, saved: bool) -> None:
        kept = "run it again to go on from there" if saved else "there is no checkpoint of it"
        super().__init__(f"training was stopped at step {step} of {steps} ({reason}); {kept}")
        self.reason, self.step, self.steps, self.saved = reason, step, steps, saved


class AccuracyCollapsed(ArithmeticError):
    """The network stopped knowing what it knew, or never learnt; the message says how much."""


def train(
    digits: Digits,
    config: TrainingConfig,
    device: Device = "auto",
    *,
    on_progress: Callable[[Progress], None] = lambda _: None,
    on_epoch: Callable[[EpochMetrics], None] = lambda _: None,
    checkpoints: CheckpointStore | None = None,
    stop: Callable[[], str | None] = lambda: None,
) -> Training:
    """Train a `DigitCNN`, going on from the newest valid checkpoint if there is one.

    `on_epoch` is called after each epoch that this call ends, `on_progress` about once a second.
    `stop` is asked before each step; a reason ends the training with a last checkpoint and
    `TrainingStopped`. In a process group of torch.distributed, every member calls this with the
    same digits and config; the first one alone calls back and writes.

    Raises ValueError for digits or a config that cannot be trained with, FloatingPointError if the
    loss or a weight stops being finite, AccuracyCollapsed.
    """
    place = choose_device(device)
    with kept_memory(), determinism(config.deterministic, place):
        run = _Run(digits, config, place)
        return run.train(on_progress, on_epoch, checkpoints, stop)


@dataclass
class _State:
    """What a checkpoint holds besides tensors."""

    step: int = 0
    seconds: float = 0.0
    outcome: Outcome = "finished"
    history: list[EpochMetrics] = field(default_factory=list)


class _Run:
    """One training: what stays, and the state that moves."""

    def __init__(self, digits: Digits, config: TrainingConfig, place: torch.device) -> None:
        self._digits, self._config, self._recipe = digits, config, config.recipe()
        self._place = place
        grouped = distributed.is_available() and distributed.is_initialized()
        self._leads = not grouped or distributed.get_rank() == 0
        self._world = distributed.get_world_size() if grouped else 1
        rank = distributed.get_rank() if grouped else 0
        self._batches = Batches(digits, config, place, rank, self._world)
        self._per_epoch = self._batches.per_epoch
        self._steps = max(config.min_steps, round(self._recipe.epochs * self._per_epoch))
        if not self._steps:
            raise ValueError(
                f"{self._recipe.epochs} epochs of {self._per_epoch} steps and min_steps "
                f"{config.min_steps} make zero steps; raise epochs or min_steps"
            )
        self._learner = Learner(config, place, self._batches.share, self._world)
        self._state = _State()

    def train(
        self,
        on_progress: Callable[[Progress], None],
        on_epoch: Callable[[EpochMetrics], None],
        checkpoints: CheckpointStore | None,
        stop: Callable[[], str | None],
    ) -> Training:
        resumed, warnings = self._resume(checkpoints) if checkpoints is not None else (None, [])
        began = time.perf_counter()
        if self._state.step < self._steps:
            self._learner.warm_up()
        warmup_seconds = time.perf_counter() - began
        writer = Writer(checkpoints) if checkpoints is not None and self._leads else None
        try:
            self._loop(on_progress, on_epoch, writer, stop)
            if writer:
                writer.submit(self._snapshot())
        finally:
            if writer:
                writer.close()
                warnings += writer.failures
        self._check_finite()
        model = self._learner.model
        model.calibrate(self._batches.sample())
        return Training(
            model=model.cpu(),
            history=self._state.history,
            device=str(self._place),
            seconds=self._state.seconds,
            warmup_seconds=warmup_seconds,
            outcome=self._state.outcome,
            steps=self._state.step,
            resumed_from=resumed,
            micro_batch=self._learner.micro_batch,
            precision=str(self._learner.dtype).removeprefix("torch."),
            warnings=warnings + self._learner.warnings,
        )

    def _loop(
        self,
        on_progress: Callable[[Progress], None],
        on_epoch: Callable[[EpochMetrics], None],
        writer: Writer | None,
        stop: Callable[[], str | None],
    ) -> None:
        state, first, before = self._state, self._state.step, self._state.seconds
        began = told = time.perf_counter()
        epoch_first, epoch_began = first, began
        batches = self._batches.start(first)
        while state.step < self._steps and state.outcome == "finished":
            reason, spent = self._check_stop(stop)
            if reason is not None:
                self._halt(reason, writer)
            if spent:
                state.outcome = "time budget"
                break
            losses = self._learner.step(*next(batches), state.step + 1, self._steps)
            self._batches.note(losses)
            state.step += 1
            ends = state.step % self._per_epoch == 0 or state.step == self._steps
            if ends:
                self._check_finite()  # waits for the device, so that the clock tells the truth
            now = time.perf_counter()
            state.seconds = before + now - began
            left = (now - began) / (state.step - first) * (self._steps - state.step)
            if ends:
                pace = (state.step - epoch_first) * self._recipe.batch_size / (now - epoch_began)
                metrics = self._end_epoch(pace, left)
                if self._leads:
                    on_epoch(metrics)
                epoch_first, epoch_began = state.step, time.perf_counter()
            if writer and state.step % self._config.checkpoint_every_steps == 0:
                writer.submit(self._snapshot())
            if self._leads and now - told >= _SECONDS_BETWEEN_PROGRESS:
                told = now
                pace = (state.step - first) * self._recipe.batch_size / (now - began)
                on_progress(Progress(state.step, self._steps, pace, left))

    def _check_stop(self, stop: Callable[[], str | None]) -> tuple[str | None, bool]:
        """Return why to stop, and whether the time is spent: the first process decides for all."""
        reason = stop() if self._leads else None
        budget = self._config.time_budget_seconds
        spent = budget is not None and self._state.seconds >= budget
        if self._world > 1:
            said = torch.tensor([reason is not None, spent], dtype=torch.uint8, device=self._place)
            distributed.broadcast(said, 0)
            stopped, spent = (bool(word) for word in said.tolist())
            if stopped and reason is None:
                reason = "the first process was asked to"
        return reason, spent

    def _halt(self, reason: str, writer: Writer | None) -> None:
        if writer:
            writer.submit(self._snapshot())
            writer.close()
        saved = writer is not None and writer.newest == self._state.step
        raise TrainingStopped(reason, self._state.step, self._steps, saved=saved)

    def _end_epoch(self, pace: float, left: float) -> EpochMetrics:
        """Measure and remember the epoch, check its accuracy, decide on an early stop."""
        state = self._state
        loss, right = self._learner.end_epoch()
        epoch = -(-state.step // self._per_epoch)
        images = (state.step - (epoch - 1) * self._per_epoch) * self._recipe.batch_size
        validated = None
        if len(self._batches.aside):
            validated = self._learner.validate(self._batches.sample(), self._batches.validation())
        metrics = EpochMetrics(
            epoch=epoch,
            step=state.step,
            loss=loss / images,
            accuracy=right / images,
            validation_loss=validated[0] if validated else None,
            validation_accuracy=validated[1] if validated else None,
            images_per_second=pace,
            seconds_left=left,
        )
        state.history.append(metrics)
        self._check_accuracy(metrics)
        patience = self._config.patience
        if patience is not None and state.step < self._steps:
            past = [each.validation_accuracy or 0.0 for each in state.history]
            if len(past) - 1 - past.index(max(past)) >= patience:
                state.outcome = "early stop"
        return metrics

    def _check_accuracy(self, metrics: EpochMetrics) -> None:
        # An epoch of hard images alone falls as low only if a tenth of all labels are wrong.
        best = max(past.accuracy for past in self._state.history)
        floor = max(_COLLAPSE * best, 2 * _GUESSING if metrics.step == self._steps else 0)
        if metrics.accuracy < floor:
            raise AccuracyCollapsed(
                f"training accuracy is {metrics.accuracy:.4f} in epoch {metrics.epoch}, below "
                f"{floor:.4f} (the best epoch had {best:.4f}); check the labels, or lower "
                f"training.learning_rate ({self._recipe.learning_rate})"
            )

    def _check_finite(self) -> None:
        if not self._learner.is_finite():
            raise FloatingPointError(
                f"the loss or a weight was not finite by step {self._state.step}; expected finite "
                f"numbers: lower training.learning_rate ({self._recipe.learning_rate})"
            )

    def _snapshot(self) -> Checkpoint:
        self._check_finite()
        live = self._tensors()
        # Laid out here: if the writer's thread did it, OpenMP would keep threads for it too, find
        # more of them than cores, and let each wait of training sleep: half as slow again.
        plain = torch.contiguous_format
        copies = {
            name: tensor.detach().to("cpu", copy=True, memory_format=plain)
            for name, tensor in live.items()
        }
        position = {
            "epoch": self._state.step // self._per_epoch,
            "position": self._state.step % self._per_epoch,
            "seed": self._config.seed,
        }
        return Checkpoint(self._state.step, self._identity, asdict(self._state) | position, copies)

    def _tensors(self) -> dict[str, Tensor]:
        """Return the live tensors that a checkpoint must hold."""
        return {**self._learner.state(), **self._batches.state()}

    @cached_property
    def _identity(self) -> dict[str, str]:
        """Say what a checkpoint of this training belongs to."""
        numbers = {
            **self._recipe.model_dump(),
            **self._config.model_dump(include={"min_steps", "seed", "validation_share"}),
            "precision": str(self._learner.dtype),
            "compiled": self._learner.compiled,
        }
        shapes = {name: list(tensor.shape) for name, tensor in self._tensors().items()}
        return {
            "data": self._digits.digest(),
            "config": json.dumps(numbers, sort_keys=True),
            "code": _code(),
            "architecture": json.dumps(shapes, sort_keys=True),
        }

    def _resume(self, store: CheckpointStore) -> tuple[int | None, list[str]]:
        """Restore the newest valid checkpoint; return its step, and why newer ones were refused."""
        checkpoint, refusals = newest_valid(store, self._identity)
        if checkpoint is None:
            return None, refusals
        with torch.no_grad():
            for name, tensor in self._tensors().items():
                tensor.copy_(checkpoint.tensors[name])
        past = checkpoint.progress
        # A spent time budget may have been raised since; it is asked again.
        outcome: Outcome = "early stop" if past["outcome"] == "early stop" else "finished"
        history = [EpochMetrics(**metrics) for metrics in past["history"]]
        self._state = _State(checkpoint.step, past["seconds"], outcome, history)
        return checkpoint.step, refusals


def _code() -> str:
    """Return a digest of this room's code and the network's, and torch's version."""
    room, total = Path(__file__).parent, hashlib.sha256()
    for module in [*sorted(room.glob("*.py")), room.parent / "model.py"]:
        total.update(module.read_bytes())
    return f"{total.hexdigest()[:16]} with torch {torch.__version__}"
