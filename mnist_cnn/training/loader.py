"""The loader: batches gathered in bulk, augmented on the device, resumable at any step."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from mnist_cnn.device import fits
from mnist_cnn.digits import CLASSES, Digits
from mnist_cnn.training.augmentation import draw_epoch, shift, soften, warp
from mnist_cnn.training.hard_examples import HardExamples
from mnist_cnn.training.recipe import Recipe, TrainingConfig

_STEPS_PER_BLOCK = 16
"""Steps whose images are gathered at once; few, so that memory does not grow with the data."""


class Batches:
    """Batches of training images, and the validation split.

    Images that fit on the device are copied there once. Otherwise a block of a few batches at a
    time is gathered from the host's memory, or from a file if `digits.images` is a memory map. The
    batches are the same either way.

    Each process gets its share of every batch. The first epoch shows every image once, later ones
    show the hard images in several rounds.

    Raises ValueError for a split that is empty, lacks a digit or has less than a batch of images,
    and for a batch that cannot be divided among the processes.
    """

    def __init__(
        self,
        digits: Digits,
        config: TrainingConfig,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._digits = digits
        self._device = device
        self._seed = config.seed
        self._recipe = config.recipe()
        self._rank = rank
        self._world = world
        self._training, self.holdout = _split(digits, config)
        _check(digits, self._training, self._recipe)
        self.share = _share(self._recipe, world)
        """Images of each batch for this process."""
        self.per_epoch = len(self._training) // self._recipe.batch_size
        """Steps an epoch; images that fill no batch are left out, others in each epoch."""
        resident = device.type != "cpu" and fits(digits.images.nbytes, device)
        # Indices and labels lie where the images are gathered.
        self._home = device if resident else torch.device("cpu")
        self._resident = torch.tensor(digits.images, device=device) if resident else None
        self._labels = torch.tensor(digits.labels, device=self._home)  # (N,)
        self._hard = HardExamples(
            len(self._training), self._recipe.hard_share, self._recipe.batch_size, device
        )
        self._shown = torch.arange(0)  # (batch_size,) once a batch was yielded

    def start(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images, uint8 (share, 28, 28), and labels (share,) from `step` on, without end.

        Call `note(losses)` before requesting the next batch.
        """
        recipe = self._recipe
        size = recipe.batch_size
        # Shifts and warps belong to positions in the epoch, not to images: an image that is shown
        # again is distorted in another way.
        positions = torch.arange(self.per_epoch * size, device=self._home)
        positions = positions.view(self.per_epoch, self._world, self.share)[:, self._rank]
        training = self._training.to(self._home)  # (N,)
        while True:
            epoch, position = divmod(step, self.per_epoch)
            draws = draw_epoch(len(training), recipe.shift, self._seed, epoch)
            first, last, order = self._round(epoch, position, draws.order)
            draws = draws.to(self._home)
            for begin in range(position, last, _STEPS_PER_BLOCK):
                end = min(begin + _STEPS_PER_BLOCK, last)
                shown = order[(begin - first) * size : (end - first) * size]
                shown = shown.view(-1, size)  # (steps, batch_size)
                mine = shown.view(-1, self._world, self.share)[:, self._rank]  # (steps, share)
                images, labels = self.load(training[mine.flatten()])  # (steps * share, 28, 28)
                for number, chosen in enumerate(positions[begin:end]):  # (share,)
                    self._shown = shown[number]
                    part = slice(number * self.share, (number + 1) * self.share)
                    shifts = draws.shifts[chosen].to(self._device)  # (share, 2)
                    warps = draws.warps[chosen].to(self._device)  # (share, 4)
                    moved = shift(images[part], shifts, recipe.shift)  # (share, 28, 28)
                    warped = warp(moved, warps, recipe.degrees, recipe.stretch)
                    yield soften(warped, recipe.blur_every), labels[part]
            step += last - position

    def _round(self, epoch: int, position: int, order: Tensor) -> tuple[int, int, Tensor]:
        """Return the round at a position in the epoch: first step, end (exclusive), order (n,)."""
        if not epoch or self._hard.round_steps >= self.per_epoch:
            return 0, self.per_epoch, order.to(self._home)
        number, within = divmod(position, self._hard.round_steps)
        first = position - within
        # In the middle of a round, after a resume, the losses of its beginning are restored.
        if not within:
            self._hard.begin_round()
        last = min(first + self._hard.round_steps, self.per_epoch)
        return first, last, self._hard.choose(number, order).to(self._home)

    def note(self, losses: Tensor) -> None:
        """Record the losses (batch_size,) of the batch yielded last, of all processes' shares."""
        self._hard.note(self._shown.to(losses.device), losses)

    def state(self) -> dict[str, Tensor]:
        """Return the live tensors of a checkpoint; copy into them to restore it."""
        return self._hard.state()

    def load(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Return images, uint8 (n, 28, 28), and labels (n,) on the device, without augmentation."""
        if self._resident is not None:
            return self._resident[chosen], self._labels[chosen]
        gathered = np.take(self._digits.images, chosen.numpy(), axis=0)
        return torch.from_numpy(gathered).to(self._device), self._labels[chosen].to(self._device)

    def validation(self, size: int = 2048) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images and labels of the validation split."""
        for first in range(0, len(self.holdout), size):
            yield self.load(self.holdout[first : first + size].to(self._home))

    def sample(self, size: int = 2048) -> Tensor:
        """Return the first training images without augmentation: the same ones every time."""
        return self.load(self._training[:size].to(self._home))[0]


def _split(digits: Digits, config: TrainingConfig) -> tuple[Tensor, Tensor]:
    """Return the indices of the training images and those of the validation split."""
    held_out = round(len(digits) * config.validation_share)
    if not held_out:
        return torch.arange(len(digits)), torch.arange(0)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(config.seed))
    return order[held_out:], order[:held_out]


def _share(recipe: Recipe, world: int) -> int:
    if recipe.batch_size % (world * recipe.norm_group):
        raise ValueError(
            f"a batch of {recipe.batch_size} in groups of {recipe.norm_group} cannot be shared by "
            f"{world} processes; use at most {recipe.batch_size // recipe.norm_group}"
        )
    return recipe.batch_size // world


def _check(digits: Digits, training: Tensor, recipe: Recipe) -> None:
    if not len(digits):
        raise ValueError("the training split is empty; nothing can be learnt from it")
    counts = np.bincount(digits.labels[training.numpy()], minlength=CLASSES)
    missing = [str(digit) for digit, count in enumerate(counts) if not count]
    if missing:
        raise ValueError(
            f"no training image shows {', '.join(missing)}; expected every digit from 0 to 9: "
            "look at what was taken in"
        )
    if len(training) < recipe.batch_size:
        raise ValueError(
            f"{len(training)} training images are fewer than one batch of {recipe.batch_size}; "
            "lower training.batch_size or bring more images"
        )
