"""What an epoch shows and how: the order of the images, and a small distortion of each."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class EpochDraws:
    """Every random number of one epoch, a function of the seed and the epoch alone.

    That is why a checkpoint needs no generator's state, and why the order is the same whatever the
    device and the number of processes.
    """

    order: Tensor
    """int64 (N,): a permutation of the images."""
    shifts: Tensor
    """int64 (N, 2): rows and columns, 0 to twice the reach, of the image shown at each place."""
    warps: Tensor
    """float32 (N, 4), -1 to 1: turn, shear, and stretch in width and in height."""

    def to(self, place: torch.device) -> "EpochDraws":
        """Return a copy on the device."""
        return EpochDraws(self.order.to(place), self.shifts.to(place), self.warps.to(place))


def draw_epoch(images: int, reach: int, seed: int, epoch: int) -> EpochDraws:
    """Draw the order of an epoch, shifts up to `reach` pixels each way, and warps. On the CPU."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(images, generator=generator)
    shifts = torch.randint(0, 2 * reach + 1, (images, 2), generator=generator)
    return EpochDraws(order, shifts, torch.rand((images, 4), generator=generator) * 2 - 1)


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


def warp(images: Tensor, warps: Tensor, degrees: float, stretch: float) -> Tensor:
    """Return uint8 (N, 28, 28) turned by up to `degrees`, sheared and stretched by up to `stretch`.

    `warps` (N, 4) says how much of that each image gets. Bilinear; paper beyond the frame.
    """
    if not degrees and not stretch:
        return images
    turn, shear, wide, high = warps.view(-1, 4, 1, 1).unbind(1)
    angle = turn * math.radians(degrees)
    side = images.shape[-1]
    # affine_grid's own product of matrices, three columns wide, takes a tenth of a training.
    across = (2 * torch.arange(side, device=images.device) + 1) / side - 1
    down = across.view(-1, 1)
    grid = torch.empty(len(images), side, side, 2, device=images.device)
    torch.add(
        (1 + stretch * wide) * angle.cos() * across,
        (stretch * shear - angle.sin()) * down,
        out=grid[..., 0],
    )
    torch.add(angle.sin() * across, (1 + stretch * high) * angle.cos() * down, out=grid[..., 1])
    pixels = images.unsqueeze(1).float()
    warped = functional.grid_sample(pixels, grid, align_corners=False)
    return warped.squeeze(1).round().to(torch.uint8)


def soften(images: Tensor, every: int) -> Tensor:
    """Return uint8 (N, 28, 28) of which the first of each `every` is out of focus; 0: none.

    Blurred by the mean of 3 x 3 pixels.
    """
    if not every:
        return images
    result = images.clone()
    sharp = images[::every].unsqueeze(1).float()
    blurred = functional.avg_pool2d(sharp, 3, stride=1, padding=1)
    result[::every] = blurred.squeeze(1).round().to(torch.uint8)
    return result
