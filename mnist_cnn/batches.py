"""Batches of a split: gathered in bulk, distorted on the device, resumable at any step."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from mnist_cnn.augmentation import draw_epoch, shift, warp
from mnist_cnn.device import fits
from mnist_cnn.digits import CLASSES, Digits
from mnist_cnn.recipe import Recipe, TrainingConfig

# Steps whose images are gathered at a time: small enough that memory stays flat.
_STEPS_PER_BLOCK = 16


class Batches:
    """The training images of a split as batches, and those set aside for validation.

    Images that fit on the device are sent there once; else each block of a few batches is gathered
    from the host's memory (or from a file, if `digits.images` is a memory map) and sent. The
    batches are the same. Of several processes, each gets its share of every batch.

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

    def start(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images, uint8 (share, 28, 28), and labels from `step` on, epoch after epoch."""
        recipe = self._recipe
        places = torch.arange(self.per_epoch * recipe.batch_size, device=self._home)
        places = places.view(self.per_epoch, self._world, self.share)[:, self._rank]
        while True:
            epoch, position = divmod(step, self.per_epoch)
            draws = draw_epoch(len(self._kept), recipe.shift, self._seed, epoch).to(self._home)
            order = self._kept.to(self._home)[draws.order]
            for first in range(position, self.per_epoch, _STEPS_PER_BLOCK):
                block = places[first : first + _STEPS_PER_BLOCK]
                images, labels = self.load(order[block.flatten()])
                for number, chosen in enumerate(block):
                    part = slice(number * self.share, (number + 1) * self.share)
                    moved = shift(images[part], draws.shifts[chosen].to(self._place), recipe.shift)
                    warps = draws.warps[chosen].to(self._place)
                    yield warp(moved, warps, recipe.degrees, recipe.stretch), labels[part]
            step += self.per_epoch - position

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
