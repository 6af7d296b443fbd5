"""What an epoch shows and how: the order of the images and a small shift of each."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class EpochDraws:
    """Every random number of one epoch, a function of the seed and the epoch alone.

    That is why a checkpoint needs no generator's state, and why the order is the same whatever the
    device and the number of processes. On the CPU.
    """

    order: Tensor
    """int64 (N,): a permutation of the images."""
    shifts: Tensor
    """int64 (N, 2): rows and columns, 0 to twice the reach, of the image shown at each place."""


def draw_epoch(images: int, reach: int, seed: int, epoch: int) -> EpochDraws:
    """Draw the order of an epoch and the shifts, up to `reach` pixels each way."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(images, generator=generator)
    return EpochDraws(order, torch.randint(0, 2 * reach + 1, (images, 2), generator=generator))


def shift(images: Tensor, shifts: Tensor, reach: int) -> Tensor:
    """Return uint8 (N, 28, 28) moved by `shifts` (N, 2), whose middle value `reach` means no move.

    Paper shows where the image leaves the frame. One gather from strided views of a padded copy.
    """
    if not reach:
        return images
    side = images.shape[-1]
    padded = functional.pad(images, (reach, reach, reach, reach))
    views = padded.unfold(1, side, 1).unfold(2, side, 1)
    place = torch.arange(len(images), device=images.device)
    return views[place, shifts[:, 0], shifts[:, 1]]
