"""The training loop: fast, repeatable, and resumable at any step."""

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

_COLLAPSE = 0.5
"""An epoch with less than this share of the best epoch's accuracy is a collapse."""

_GUESSING = 1 / CLASSES
"""Accuracy of guessing. A training that ends with less than twice as much has learnt nothing."""


@dataclass(frozen=True)
class Progress:
    """Progress of a training, reported about once a second."""

    step: int
    steps: int
    """Steps of the whole training."""
    images_per_second: float
    seconds_left: float


@dataclass(frozen=True)
class EpochMetrics:
    """Metrics of one epoch of training; the last epoch may be a partial one."""

    epoch: int
    step: int
    """Optimizer steps taken by its end."""
    loss: float
    """Mean cross entropy over the images shown, against smoothed labels, nats."""
    accuracy: float
    """Share of the images shown that were classified correctly before their step. After the first
    epoch these are the hard images, each several times."""
    validation_loss: float | None
    """Mean cross entropy of the validation split, nats; None without one."""
    validation_accuracy: float | None
    images_per_second: float
    seconds_left: float


@dataclass(frozen=True)
class Training:
    """A finished training: the model, in eval mode on the CPU, and its history."""

    model: DigitCNN
    history: list[EpochMetrics]
    device: str
    seconds: float
    """Time of training, including that before a resume."""
    warmup_seconds: float
    """Time of compiling and warming up before it, in this call alone."""
    outcome: Outcome
    steps: int
    resumed_from: int | None
    """Step of the checkpoint that it resumed from; None if it started from the first step."""
    micro_batch: int
    precision: str
    warnings: list[str]
    """A sentence for each checkpoint refused or not written, and each time memory ran out."""


class TrainingStopped(RuntimeError):
    """Training was stopped on request; it can be resumed if `saved`."""

    def __init__(self, reason: str, step: int, steps: int, *, saved: bool) -> None:
        kept = "run it again to go on from there" if saved else "there is no checkpoint of it"
        super().__init__(f"training was stopped at step {step} of {steps} ({reason}); {kept}")
        self.reason = reason
        self.step = step
        self.steps = steps
        self.saved = saved


class AccuracyCollapsed(ArithmeticError):
    """The training accuracy fell by half, or ended close to guessing."""


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
    """Train a `DigitCNN`, resuming from the newest valid checkpoint if there is one.

    `on_epoch` is called after each epoch that ends in this call, `on_progress` about once a second.
    `stop` is called before each step; if it returns a reason, training ends with a last checkpoint
    and `TrainingStopped`. In a process group of torch.distributed, every member calls this function
    with the same digits and config; only the first member uses the callbacks and writes.

    Raises ValueError for unfit digits or config, FloatingPointError if the loss or a weight is not
    finite, AccuracyCollapsed, and MemoryError if the device is too small.
    """
    chosen = choose_device(device)
    with kept_memory(), determinism(chosen, wanted=config.deterministic):
        run = _Run(digits, config, chosen)
        return run.train(on_progress, on_epoch, checkpoints, stop)


@dataclass
class _State:
    """State in a checkpoint besides tensors."""

    step: int = 0
    seconds: float = 0.0
    outcome: Outcome = "finished"
    history: list[EpochMetrics] = field(default_factory=list)


class _Run:
    """One training: its configuration, loader and learner, and the state that advances."""

    def __init__(self, digits: Digits, config: TrainingConfig, device: torch.device) -> None:
        self._digits = digits
        self._config = config
        self._recipe = config.recipe()
        self._device = device
        grouped = distributed.is_available() and distributed.is_initialized()
        self._leads = not grouped or distributed.get_rank() == 0
        self._world = distributed.get_world_size() if grouped else 1
        rank = distributed.get_rank() if grouped else 0
        self._batches = Batches(digits, config, device, rank, self._world)
        self._per_epoch = self._batches.per_epoch
        self._steps = max(config.min_steps, round(self._recipe.epochs * self._per_epoch))
        if not self._steps:
            raise ValueError(
                f"{self._recipe.epochs} epochs of {self._per_epoch} steps and min_steps "
                f"{config.min_steps} make zero steps; raise epochs or min_steps"
            )
        self._learner = Learner(config, device, self._batches.share, self._world)
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
                writer.submit(self._checkpoint())
        finally:
            if writer:
                writer.close()
                warnings += writer.failures
        self._check_finite()
        model = self._learner.model
        # Statistics of the final weights; during training no running average is kept.
        model.calibrate(self._batches.sample())
        return Training(
            model=model.cpu(),
            history=self._state.history,
            device=str(self._device),
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
        state = self._state
        first = state.step
        before = state.seconds
        began = reported = time.perf_counter()
        epoch_first = first
        epoch_began = began
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
                self._check_finite()  # waits for the device, so the clock covers all of its work
            now = time.perf_counter()
            state.seconds = before + now - began
            left = (now - began) / (state.step - first) * (self._steps - state.step)
            if ends:
                pace = (state.step - epoch_first) * self._recipe.batch_size / (now - epoch_began)
                metrics = self._end_epoch(pace, left)
                if self._leads:
                    on_epoch(metrics)
                epoch_first = state.step
                epoch_began = time.perf_counter()  # without the validation
            if writer and state.step % self._config.checkpoint_every_steps == 0:
                writer.submit(self._checkpoint())
            if self._leads and now - reported >= _SECONDS_BETWEEN_PROGRESS:
                reported = now
                pace = (state.step - first) * self._recipe.batch_size / (now - began)
                on_progress(Progress(state.step, self._steps, pace, left))

    def _check_stop(self, stop: Callable[[], str | None]) -> tuple[str | None, bool]:
        """Return the reason to stop, or None, and True if the time budget is spent.

        The first process decides for all: clocks differ, and a step needs every process.
        """
        reason = stop() if self._leads else None
        budget = self._config.time_budget_seconds
        spent = budget is not None and self._state.seconds >= budget
        if self._world > 1:
            flags = torch.tensor(
                [reason is not None, spent], dtype=torch.uint8, device=self._device
            )
            distributed.broadcast(flags, 0)
            stopped, spent = (bool(flag) for flag in flags.tolist())
            if stopped and reason is None:
                reason = "the first process was asked to"
        return reason, spent

    def _halt(self, reason: str, writer: Writer | None) -> None:
        if writer:
            writer.submit(self._checkpoint())
            writer.close()
        saved = writer is not None and writer.newest == self._state.step
        raise TrainingStopped(reason, self._state.step, self._steps, saved=saved)

    def _end_epoch(self, pace: float, left: float) -> EpochMetrics:
        """Record the epoch's metrics, check its accuracy, decide on an early stop."""
        state = self._state
        loss, right = self._learner.end_epoch()
        # Rounded up: the last epoch may be a partial one.
        epoch = -(-state.step // self._per_epoch)
        images = (state.step - (epoch - 1) * self._per_epoch) * self._recipe.batch_size
        validated = None
        if len(self._batches.holdout):
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
            # Epochs since the first of the best.
            if len(past) - 1 - past.index(max(past)) >= patience:
                state.outcome = "early stop"
        return metrics

    def _check_accuracy(self, metrics: EpochMetrics) -> None:
        # Later epochs show only hard images, whose accuracy is lower; but half of the best epoch's
        # is reached unless a tenth of all labels are wrong.
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

    def _checkpoint(self) -> Checkpoint:
        self._check_finite()
        live = self._tensors()
        # Made contiguous in this thread. In the writer's, OpenMP would start a second set of
        # threads; with more threads than cores, each wait of training would sleep.
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
        """Return the live tensors of a checkpoint, by name."""
        return {**self._learner.state(), **self._batches.state()}

    @cached_property
    def _identity(self) -> dict[str, str]:
        """Identity of this training: a checkpoint with another one is refused.

        Data, config and code decide the result of a step. The interval of checkpoints, the time
        budget and the micro-batch do not, so these may change before a resume.
        """
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
        """Restore the newest valid checkpoint; return its step, and the refusals of newer ones."""
        checkpoint, refusals = newest_valid(store, self._identity)
        if checkpoint is None:
            return None, refusals
        with torch.no_grad():
            for name, tensor in self._tensors().items():
                tensor.copy_(checkpoint.tensors[name])
        past = checkpoint.progress
        # A spent time budget may have been raised since; it is checked again.
        outcome: Outcome = "early stop" if past["outcome"] == "early stop" else "finished"
        history = [EpochMetrics(**metrics) for metrics in past["history"]]
        self._state = _State(checkpoint.step, past["seconds"], outcome, history)
        return checkpoint.step, refusals


def _code() -> str:
    """Return a digest of the code of this room and of the network, and torch's version."""
    room = Path(__file__).parent
    total = hashlib.sha256()
    for module in [*sorted(room.glob("*.py")), room.parent / "model.py"]:
        total.update(module.read_bytes())
    return f"{total.hexdigest()[:16]} with torch {torch.__version__}"
