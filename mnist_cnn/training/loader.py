"""Batches of a split: gathered in bulk, distorted on the device, resumable at any step."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from mnist_cnn.device import fits
from mnist_cnn.digits import CLASSES, Digits
from mnist_cnn.training.augmentation import draw_epoch, shift, soften, warp
from mnist_cnn.training.hard_examples import HardExamples
from mnist_cnn.training.recipe import Recipe, TrainingConfig

# Steps whose images are gathered at a time: small enough that memory stays flat.
_STEPS_PER_BLOCK = 16


class Batches:
    """The training images of a split as batches, and those set aside for validation.

    Images that fit on the device are sent there once; else each block of a few batches is gathered
    from the host's memory (or from a file, if `digits.images` is a memory map) and sent. The
    batches are the same. Of several processes, each gets its share of every batch. The first epoch
    shows every image once, a later one shows the hard ones in several rounds.

    Raises ValueError if nothing can be learnt from the split.
    """

    def __init__(
        self,
        digits: Digits,
        config: TrainingConfig,
        place: torch.device,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._digits, self._place, self._seed = digits, place, config.seed
        self._recipe, self._rank, self._world = config.recipe(), rank, world
        self._kept, self.aside = _split(digits, config)
        _check(digits, self._kept, self._recipe)
        self.share = _share(self._recipe, world)
        """Images that this process gets of each batch."""
        self.per_epoch = len(self._kept) // self._recipe.batch_size
        """Steps an epoch; the images that fill no batch are left out, others each time."""
        resident = place.type != "cpu" and fits(digits.images.nbytes, place)
        self._home = place if resident else torch.device("cpu")
        self._resident = torch.tensor(digits.images, device=place) if resident else None
        self._labels = torch.tensor(digits.labels, device=self._home)
        self._hard = HardExamples(
            len(self._kept), self._recipe.hard_share, self._recipe.batch_size, place
        )
        self._shown = torch.arange(0)

    def start(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images, uint8 (share, 28, 28), and labels from `step` on, epoch after epoch.

        Before the next batch is asked for, `note` must have been told the losses of this one.
        """
        recipe, size = self._recipe, self._recipe.batch_size
        places = torch.arange(self.per_epoch * size, device=self._home)
        places = places.view(self.per_epoch, self._world, self.share)[:, self._rank]
        kept = self._kept.to(self._home)
        while True:
            epoch, position = divmod(step, self.per_epoch)
            draws = draw_epoch(len(kept), recipe.shift, self._seed, epoch)
            first, last, order = self._round(epoch, position, draws.order)
            draws = draws.to(self._home)
            for begin in range(position, last, _STEPS_PER_BLOCK):
                end = min(begin + _STEPS_PER_BLOCK, last)
                shown = order[(begin - first) * size : (end - first) * size].view(-1, size)
                mine = shown.view(-1, self._world, self.share)[:, self._rank]
                images, labels = self.load(kept[mine.flatten()])
                for number, chosen in enumerate(places[begin:end]):
                    self._shown = shown[number]
                    part = slice(number * self.share, (number + 1) * self.share)
                    moved = shift(images[part], draws.shifts[chosen].to(self._place), recipe.shift)
                    warps = draws.warps[chosen].to(self._place)
                    turned = warp(moved, warps, recipe.degrees, recipe.stretch)
                    yield soften(turned, recipe.blur_every), labels[part]
            step += last - position

    def _round(self, epoch: int, position: int, order: Tensor) -> tuple[int, int, Tensor]:
        """Return the round that `position` lies in: its first step, the one after it, its order."""
        if not epoch or self._hard.round_steps >= self.per_epoch:
            return 0, self.per_epoch, order.to(self._home)
        number, within = divmod(position, self._hard.round_steps)
        first = position - within
        if not within:
            self._hard.begin_round()
        last = min(first + self._hard.round_steps, self.per_epoch)
        return first, last, self._hard.choose(number, order).to(self._home)

    def note(self, losses: Tensor) -> None:
        """Remember the losses of the whole batch that was yielded last, all processes' shares."""
        self._hard.note(self._shown.to(losses.device), losses)

    def state(self) -> dict[str, Tensor]:
        """Return the live tensors that a checkpoint must hold; copy into them to restore."""
        return self._hard.state()

    def load(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Return these images and labels, undistorted, on the device."""
        if self._resident is not None:
            return self._resident[chosen], self._labels[chosen]
        gathered = np.take(self._digits.images, chosen.numpy(), axis=0)
        return torch.from_numpy(gathered).to(self._place), self._labels[chosen].to(self._place)

    def validation(self, size: int = 2048) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the images and labels that are set aside."""
        for first in range(0, len(self.aside), size):
            yield self.load(self.aside[first : first + size].to(self._home))

    def sample(self, size: int = 2048) -> Tensor:
        """Return some training images, undistorted: always the same ones."""
        return self.load(self._kept[:size].to(self._home))[0]


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


def _check(digits: Digits, kept: Tensor, recipe: Recipe) -> None:
    if not len(digits):
        raise ValueError("the training split is empty; nothing can be learnt from it")
    counts = np.bincount(digits.labels[kept.numpy()], minlength=CLASSES)
    missing = [str(digit) for digit, count in enumerate(counts) if not count]
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
