"""Train the CNN on digits that are in memory: fast, repeatable, and resumable at any step."""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, Self

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, distributed, nn
from torch.nn import functional

from mnist_cnn.augmentation import draw_epoch, shift
from mnist_cnn.checkpoint import Checkpoint, CheckpointStore, Writer, newest_valid
from mnist_cnn.device import (
    Device,
    Precision,
    choose_device,
    choose_precision,
    determinism,
    fits,
    kept_memory,
)
from mnist_cnn.digits import CLASSES, Digits
from mnist_cnn.model import DigitCNN
from mnist_cnn.optimization import Optimizer

_log = logging.getLogger(__name__)

Preset = Literal["quick", "standard", "best"]
Outcome = Literal["finished", "early stop", "time budget"]

_SECONDS_BETWEEN_PROGRESS = 1.0
# Steps whose images are gathered and padded at a time: small enough that memory stays flat.
_STEPS_PER_BLOCK = 16
_CALIBRATION_IMAGES = 2048
# An epoch with less than this share of the best epoch's accuracy has collapsed, and a training that
# ends with less than twice the accuracy of guessing has learnt nothing.
_COLLAPSE, _GUESSING = 0.5, 1 / CLASSES


class Recipe(BaseModel, frozen=True, extra="forbid"):
    """The numbers that decide what is learnt; a preset is one of these."""

    epochs: float = Field(gt=0, le=1000, description="Passes over the training images.")
    batch_size: int = Field(ge=1, le=65536, description="Images a step.")
    norm_group: int = Field(ge=2, description="Images that share batch normalisation's statistics.")
    channels: tuple[int, int, int, int] = Field(description="Filters of the four convolutions.")
    filter_rate: float = Field(gt=0, le=10, description="Peak learning rate of filters.")
    momentum: float = Field(ge=0, lt=1, description="Momentum of filters.")
    learning_rate: float = Field(gt=0, le=10, description="Peak learning rate of everything else.")
    weight_decay: float = Field(ge=0, le=1, description="AdamW's, for everything but filters.")
    warmup: float = Field(ge=0, lt=1, description="Share of the steps with a rising rate.")
    label_smoothing: float = Field(ge=0, lt=1, description="Share of the target spread evenly.")
    shift: int = Field(ge=0, le=4, description="Images move by up to so many pixels each way.")


RECIPES: dict[Preset, Recipe] = {
    "standard": Recipe(
        epochs=3,
        batch_size=256,
        norm_group=256,
        channels=(16, 32, 32, 64),
        filter_rate=0.1,
        momentum=0.6,
        learning_rate=0.01,
        weight_decay=0.01,
        warmup=0.2,
        label_smoothing=0.1,
        shift=1,
    )
}
RECIPES["quick"] = RECIPES["standard"].model_copy(update={"epochs": 0.6, "shift": 0})
RECIPES["best"] = RECIPES["standard"].model_copy(update={"epochs": 8})


class TrainingConfig(BaseModel, frozen=True, extra="forbid"):
    """How the CNN is trained. The defaults are production's; an empty field is the preset's."""

    preset: Preset = Field(
        "standard",
        description="quick: seconds, to see that all is well; standard: every week; "
        "best: as accurate as this network gets.",
    )
    epochs: float | None = Field(
        None, gt=0, le=1000, description="Passes over the training images; empty: the preset's."
    )
    batch_size: int | None = Field(
        None, ge=2, le=65536, description="Images a step; empty: the preset's."
    )
    learning_rate: float | None = Field(
        None, gt=0, le=10, description="Peak rate of all but filters; empty: the preset's."
    )
    min_steps: int = Field(
        120,
        ge=0,
        le=1_000_000,
        description="Optimizer steps at least: few images are shown in as many epochs as it takes.",
    )
    seed: int = Field(0, ge=0, lt=2**40, description="Same seed, same machine: the same weights.")
    validation_share: float = Field(
        0.0, ge=0, le=0.5, description="Part of the training images set aside and measured on."
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="Stop after so many epochs without a better validation accuracy; "
        "empty: never. Needs a validation share.",
    )
    time_budget_seconds: float | None = Field(
        None, gt=0, description="Stop training after so long, with the model of then; empty: never."
    )
    precision: Precision = Field(
        "auto", description="Number format of convolutions; auto: bf16 where the hardware has it."
    )
    deterministic: bool = Field(
        True,
        description="On a GPU: bitwise the same weights for the same seed, at the cost of speed. "
        "A CPU repeats itself anyway.",
    )
    checkpoint_every_steps: int = Field(
        100, ge=1, description="Steps between checkpoints, if there is a place to keep them."
    )
    micro_batch: int | None = Field(
        None,
        ge=2,
        description="Images on the device at a time, gradients being added up; "
        "empty: what suits the device.",
    )

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.patience is not None and not self.validation_share:
            raise ValueError(
                f"patience is {self.patience} but validation_share is 0, so there is nothing to "
                "wait for; set validation_share, for example to 0.1"
            )
        return self

    def recipe(self) -> Recipe:
        """Return the preset's recipe with the fields that were set here."""
        knobs = ("epochs", "batch_size", "learning_rate")
        given = {knob: getattr(self, knob) for knob in knobs if getattr(self, knob) is not None}
        preset = RECIPES[self.preset]
        batch = given.get("batch_size", preset.batch_size)
        group = preset.norm_group if batch % preset.norm_group == 0 else batch
        return preset.model_copy(update={**given, "norm_group": group})


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
    """Share of the epoch's training images that were classified rightly as they went by."""
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
    outcome: Outcome
    steps: int
    resumed_from: int | None
    """The step of the checkpoint that it went on from; None if it began at the beginning."""
    micro_batch: int
    precision: str
    warnings: list[str]
    """Sentences: checkpoints that were refused or could not be written, memory that ran out."""


class TrainingStopped(RuntimeError):  # noqa: N818 - a request that was obeyed
    """Training was asked to stop and can be gone on with; the message says from where."""

    def __init__(self, reason: str, step: int, steps: int, *, saved: bool) -> None:
        kept = "run it again to go on from there" if saved else "there is no checkpoint of it"
        super().__init__(f"training was stopped at step {step} of {steps} ({reason}); {kept}")
        self.reason, self.step, self.saved = reason, step, saved


class AccuracyCollapsed(ArithmeticError):  # noqa: N818 - a state, as FloatingPointError is not
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
    """What changes from step to step, besides tensors: a checkpoint's `progress`."""

    step: int = 0
    seconds: float = 0.0
    outcome: Outcome = "finished"
    history: list[EpochMetrics] = field(default_factory=list)


class _Run:
    """One training: what stays, and the state that moves."""

    def __init__(self, digits: Digits, config: TrainingConfig, place: torch.device) -> None:
        self.digits, self.config, self.recipe, self.place = digits, config, config.recipe(), place
        self.kept, self.aside = _split(digits, config)
        grouped = distributed.is_available() and distributed.is_initialized()
        self.rank = distributed.get_rank() if grouped else 0
        self.world = distributed.get_world_size() if grouped else 1
        self.share = _share(self.recipe, self.world)
        _check(digits, self.kept, self.recipe)
        self.per_epoch = len(self.kept) // self.recipe.batch_size
        self.steps = max(config.min_steps, round(self.recipe.epochs * self.per_epoch))
        if not self.steps:
            raise ValueError(
                f"{self.recipe.epochs} epochs of {self.per_epoch} steps and min_steps "
                f"{config.min_steps} make zero steps; raise epochs or min_steps"
            )
        self.dtype = choose_precision(config.precision, place)
        whole = self.share if place.type == "cuda" else self.recipe.norm_group
        self.micro = min(_micro_batch(config, self.recipe) or whole, self.share)
        self.state, self.warnings = _State(), list[str]()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = DigitCNN(self.recipe.channels)
        self.model.to(place, memory_format=torch.channels_last).train()
        self.model.group_statistics(self.recipe.norm_group)
        self.net: nn.Module = self.model
        if self.world > 1:
            self.net = nn.parallel.DistributedDataParallel(self.model, broadcast_buffers=False)
        self.optimizer = Optimizer(
            self.model.named_parameters(),
            filter_rate=self.recipe.filter_rate,
            momentum=self.recipe.momentum,
            rate=self.recipe.learning_rate,
            weight_decay=self.recipe.weight_decay,
        )
        self.sums = torch.zeros(2, device=place)  # of the epoch: loss, images that were right
        stays = fits(digits.images.nbytes, place) and place.type != "cpu"
        self.resident = torch.tensor(digits.images, device=place) if stays else None
        self.labels = torch.tensor(digits.labels, device=place if stays else "cpu")

    def train(
        self,
        on_progress: Callable[[Progress], None],
        on_epoch: Callable[[EpochMetrics], None],
        checkpoints: CheckpointStore | None,
        stop: Callable[[], str | None],
    ) -> Training:
        resumed = self._resume(checkpoints) if checkpoints else None
        writer = Writer(checkpoints) if checkpoints and self.rank == 0 else None
        try:
            self._loop(on_progress, on_epoch, writer, stop)
            if writer:
                writer.submit(self._snapshot())
        finally:
            if writer:
                writer.close()
                self.warnings.extend(writer.failures)
        self._calibrate()
        return Training(
            model=self.model.cpu(),
            history=self.state.history,
            device=str(self.place),
            seconds=self.state.seconds,
            outcome=self.state.outcome,
            steps=self.state.step,
            resumed_from=resumed,
            micro_batch=self.micro,
            precision=str(self.dtype).removeprefix("torch."),
            warnings=self.warnings,
        )

    def _loop(
        self,
        on_progress: Callable[[Progress], None],
        on_epoch: Callable[[EpochMetrics], None],
        writer: Writer | None,
        stop: Callable[[], str | None],
    ) -> None:
        state, before = self.state, self.state.seconds
        began = told = epoch_began = time.perf_counter()
        first = state.step
        epoch_step = first
        for images, labels in self._batches(first):
            if state.step >= self.steps or state.outcome != "finished":
                break
            reason, spent = self._ask(stop, state.seconds)
            if reason is not None:
                self._halt(reason, writer)
            if spent:
                state.outcome = "time budget"
                break
            self._step(images, labels)
            state.step += 1
            now = time.perf_counter()
            state.seconds = before + now - began
            left = (now - began) / (state.step - first) * (self.steps - state.step)
            if state.step % self.per_epoch == 0 or state.step == self.steps:
                speed = (state.step - epoch_step) * self.recipe.batch_size / (now - epoch_began)
                metrics = self._end_epoch(speed, left)
                if self.rank == 0:
                    on_epoch(metrics)
                epoch_began, epoch_step = time.perf_counter(), state.step
            if writer and state.step % self.config.checkpoint_every_steps == 0:
                writer.submit(self._snapshot())
            if self.rank == 0 and now - told >= _SECONDS_BETWEEN_PROGRESS:
                told = now
                pace = (state.step - first) * self.recipe.batch_size / (now - began)
                on_progress(Progress(state.step, self.steps, pace, left))

    def _batches(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this member's share of every batch from `step` on, for ever."""
        home = self.labels.device
        while True:
            epoch, position = divmod(step, self.per_epoch)
            draws = draw_epoch(len(self.kept), self.recipe.shift, self.config.seed, epoch)
            order, shifts = self.kept[draws.order].to(home), draws.shifts.to(home)
            places = torch.arange(self.per_epoch * self.recipe.batch_size, device=home)
            places = places.view(self.per_epoch, self.world, self.share)[:, self.rank]
            for block in places[position:].split(_STEPS_PER_BLOCK):
                chosen = order[block.flatten()]
                images = shift(self._gather(chosen), shifts[block.flatten()], self.recipe.shift)
                yield from zip(
                    images.to(self.place).split(self.share),
                    self.labels[chosen].to(self.place).split(self.share),
                    strict=True,
                )
            step += self.per_epoch - position

    def _gather(self, chosen: Tensor) -> Tensor:
        if self.resident is not None:
            return self.resident[chosen]
        return torch.from_numpy(self.digits.images[chosen.numpy()])

    def _step(self, images: Tensor, labels: Tensor) -> None:
        while True:
            try:
                sums = self._gradients(images, labels)
                break
            except RuntimeError as error:
                if not _out_of_memory(error):
                    raise
                self._halve(error)
        warm, done = self.recipe.warmup * self.steps, self.state.step + 1
        factor = min(done / warm if warm else 1.0, (self.steps - done + 1) / (self.steps - warm))
        self.optimizer.step(done, factor)
        self.sums += sums

    def _gradients(self, images: Tensor, labels: Tensor) -> Tensor:
        """Add up the gradients of the batch's mean loss; return the sums of loss and of right."""
        self.optimizer.zero_grad()
        sums: list[Tensor] = []
        micro = list(zip(images.split(self.micro), labels.split(self.micro), strict=True))
        for number, (part, truth) in enumerate(micro, 1):
            waits = self.world > 1 and number < len(micro)
            with self.net.no_sync() if waits else nullcontext():  # type: ignore[operator]  # only DDP waits
                with torch.autocast(self.place.type, self.dtype, self.dtype != torch.float32):
                    logits = self.net(part)
                loss = functional.cross_entropy(
                    logits, truth, reduction="sum", label_smoothing=self.recipe.label_smoothing
                )
                (loss / self.share).backward()  # type: ignore[no-untyped-call]
            sums.append(torch.stack([loss.detach(), (logits.argmax(1) == truth).sum()]))
        return torch.stack(sums).sum(0)

    def _halve(self, error: RuntimeError) -> None:
        smaller = self.micro // 2
        if self.world > 1 or smaller % self.recipe.norm_group:
            raise MemoryError(
                f"{self.place} has no memory for {self.micro} images at a time and fewer would "
                "change the mathematics; lower training.batch_size"
            ) from error
        sentence = (
            f"{self.place} has no memory for {self.micro} images at a time; going on with "
            f"{smaller}, gradients added up: the result is the same"
        )
        _log.warning("%s", sentence)
        self.warnings.append(sentence)
        self.micro = smaller

    def _end_epoch(self, speed: float, left: float) -> EpochMetrics:
        """Measure, check and remember the epoch; decide on an early stop."""
        state = self.state
        self._check_finite()
        if self.world > 1:
            distributed.all_reduce(self.sums)
        loss, right = self.sums.tolist()
        self.sums.zero_()
        epoch = -(-state.step // self.per_epoch)
        images = (state.step - (epoch - 1) * self.per_epoch) * self.recipe.batch_size
        aside = self._validate() if len(self.aside) else (None, None)
        metrics = EpochMetrics(
            epoch, state.step, loss / images, right / images, *aside, speed, left
        )
        state.history.append(metrics)
        best = max(past.accuracy for past in state.history)
        floor = max(_COLLAPSE * best, 2 * _GUESSING if state.step == self.steps else 0)
        if metrics.accuracy < floor:
            raise AccuracyCollapsed(
                f"training accuracy is {metrics.accuracy:.4f} in epoch {epoch}, below {floor:.4f} "
                f"(the best epoch had {best:.4f}); check the labels, or lower "
                f"training.learning_rate ({self.recipe.learning_rate})"
            )
        patience = self.config.patience
        if patience is not None and state.step < self.steps:
            values = [past.validation_accuracy or 0.0 for past in state.history]
            if len(values) - 1 - values.index(max(values)) >= patience:
                state.outcome = "early stop"
        return metrics

    def _check_finite(self) -> None:
        sound = [self.sums, *self.model.parameters()]
        if not bool(torch.stack([tensor.isfinite().all() for tensor in sound]).all()):
            raise FloatingPointError(
                f"the loss or a weight was not finite by step {self.state.step}; expected finite "
                f"numbers: lower training.learning_rate ({self.recipe.learning_rate})"
            )

    def _validate(self) -> tuple[float, float]:
        self._calibrate()
        loss = right = 0.0
        with torch.inference_mode():
            for part in self.aside.split(_CALIBRATION_IMAGES):
                home = part.to(self.labels.device)
                logits = self.model(self._gather(home).to(self.place))
                truth = self.labels[home].to(self.place)
                loss += float(functional.cross_entropy(logits, truth, reduction="sum"))
                right += int((logits.argmax(1) == truth).sum())
        self.model.train()
        return loss / len(self.aside), right / len(self.aside)

    def _calibrate(self) -> None:
        chosen = self.kept[:_CALIBRATION_IMAGES].to(self.labels.device)
        self.model.calibrate(self._gather(chosen).to(self.place))

    def _ask(self, stop: Callable[[], str | None], seconds: float) -> tuple[str | None, bool]:
        """Return why to stop, and whether the time is spent: the first member decides for all."""
        reason = stop() if self.rank == 0 else None
        budget = self.config.time_budget_seconds
        spent = budget is not None and seconds >= budget
        if self.world > 1:
            said = torch.tensor([reason is not None, spent], dtype=torch.int32, device=self.place)
            distributed.broadcast(said, 0)
            stopped, spent = (bool(word) for word in said.tolist())
            reason = reason or ("the first process was asked to" if stopped else None)
        return reason, spent

    def _halt(self, reason: str, writer: Writer | None) -> None:
        saved = False
        if writer:
            failures = len(writer.failures)
            writer.submit(self._snapshot())
            writer.close()
            saved = len(writer.failures) == failures
        raise TrainingStopped(reason, self.state.step, self.steps, saved=saved)

    def _tensors(self) -> dict[str, Tensor]:
        """Return the live tensors that a checkpoint holds."""
        model = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        optimizer = {f"optimizer.{n}": tensor for n, tensor in self.optimizer.state().items()}
        return {**model, **optimizer, "sums": self.sums}

    def _snapshot(self) -> Checkpoint:
        self._check_finite()
        state = self.state
        progress = {
            "seconds": state.seconds,
            "outcome": state.outcome,
            "history": [asdict(metrics) for metrics in state.history],
            "epoch": state.step // self.per_epoch,
            "position": state.step % self.per_epoch,
            "seed": self.config.seed,
        }
        live = self._tensors()
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in live.items()}
        return Checkpoint(state.step, self.identity(), progress, copies)

    def identity(self) -> dict[str, str]:
        """Say what a checkpoint of this training belongs to."""
        if not hasattr(self, "_identity"):
            numbers = {
                **self.recipe.model_dump(),
                **self.config.model_dump(include={"min_steps", "seed", "validation_share"}),
                "precision": str(self.dtype),
            }
            shapes = {name: list(tensor.shape) for name, tensor in self._tensors().items()}
            self._identity = {
                "data": self.digits.digest(),
                "config": json.dumps(numbers, sort_keys=True),
                "code": _code(),
                "architecture": json.dumps(shapes, sort_keys=True),
            }
        return self._identity

    def _resume(self, store: CheckpointStore) -> int | None:
        checkpoint, refusals = newest_valid(store, self.identity())
        self.warnings.extend(refusals)
        if checkpoint is None:
            return None
        with torch.no_grad():
            for name, tensor in self._tensors().items():
                tensor.copy_(checkpoint.tensors[name])
        past = dict(checkpoint.progress)
        history = [EpochMetrics(**metrics) for metrics in past["history"]]
        self.state = _State(checkpoint.step, past["seconds"], past["outcome"], history)
        return checkpoint.step


def _split(digits: Digits, config: TrainingConfig) -> tuple[Tensor, Tensor]:
    """Return the indices to train on and those set aside for validation."""
    aside = round(len(digits) * config.validation_share)
    if not aside:
        return torch.arange(len(digits)), torch.arange(0)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(config.seed))
    return order[aside:], order[:aside]


def _share(recipe: Recipe, world: int) -> int:
    if recipe.batch_size % (world * recipe.norm_group):
        raise ValueError(
            f"a batch of {recipe.batch_size} in groups of {recipe.norm_group} cannot be shared by "
            f"{world} processes; use at most {recipe.batch_size // recipe.norm_group}"
        )
    return recipe.batch_size // world


def _micro_batch(config: TrainingConfig, recipe: Recipe) -> int | None:
    if config.micro_batch is not None and config.micro_batch % recipe.norm_group:
        raise ValueError(
            f"micro_batch is {config.micro_batch}; expected a multiple of {recipe.norm_group}, "
            "the images that share batch normalisation's statistics"
        )
    return config.micro_batch


def _check(digits: Digits, kept: Tensor, recipe: Recipe) -> None:
    if not len(digits):
        raise ValueError("the training split is empty; nothing can be learnt from it")
    counts = torch.bincount(torch.tensor(digits.labels)[kept], minlength=CLASSES)
    missing = [str(digit) for digit, count in enumerate(counts.tolist()) if not count]
    if missing:
        raise ValueError(
            f"no training image shows {', '.join(missing)}; expected every digit from 0 to 9: "
            "look at what was taken in"
        )
    if len(kept) < recipe.batch_size:
        raise ValueError(
            f"{len(kept)} training images are fewer than one batch of {recipe.batch_size}; "
            "lower training.batch_size or bring more images"
        )


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(
        sign in str(error) for sign in ("out of memory", "can't allocate memory")
    )


def _code() -> str:
    """Return a digest of the modules that decide the numbers, and torch's version."""
    total = hashlib.sha256()
    for module in ("augmentation", "model", "optimization", "training"):
        total.update((Path(__file__).parent / f"{module}.py").read_bytes())
    return f"{total.hexdigest()[:16]} with torch {torch.__version__}"
