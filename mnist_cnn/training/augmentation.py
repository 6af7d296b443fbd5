"""Augmentation: the order of an epoch's images, and a small random distortion of each."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class EpochDraws:
    """The random numbers of one epoch, a function of the seed and the epoch alone.

    A checkpoint therefore needs no generator's state, and the order is the same on every device and
    for any number of processes.
    """

    order: Tensor
    """int64 (N,): a permutation of the images."""
    shifts: Tensor
    """int64 (N, 2): rows and columns, 0 to twice the reach, of the image at each position."""
    warps: Tensor
    """float32 (N, 4), -1 to 1: rotation, shear, stretch in width and stretch in height."""

    def to(self, device: torch.device) -> "EpochDraws":
        """Return a copy on the device."""
        return EpochDraws(self.order.to(device), self.shifts.to(device), self.warps.to(device))


def draw_epoch(images: int, reach: int, seed: int, epoch: int) -> EpochDraws:
    """Draw the order of an epoch, shifts up to `reach` pixels each way, and warps; on the CPU.

    A GPU has a generator of its own, which would give other numbers for the same seed.
    """
    # The factor keeps the epochs of one seed apart from those of the next.
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(images, generator=generator)  # (N,)
    shifts = torch.randint(0, 2 * reach + 1, (images, 2), generator=generator)  # (N, 2)
    warps = torch.rand((images, 4), generator=generator) * 2 - 1  # (N, 4)
    return EpochDraws(order, shifts, warps)


def shift(images: Tensor, shifts: Tensor, reach: int) -> Tensor:
    """Return uint8 (N, 28, 28) moved by `shifts` (N, 2), whose middle value `reach` is no move.

    Pixels beyond the frame are background (0).
    """
    if not reach:
        return images
    # Every shift of an image is a window of its padded copy. The windows are strided views that
    # share memory, and one gather copies the window that was drawn for each image.
    side = images.shape[-1]
    padded = functional.pad(images, (reach, reach, reach, reach))  # (N, 28 + 2r, 28 + 2r)
    windows = padded.unfold(1, side, 1).unfold(2, side, 1)  # (N, 2r + 1, 2r + 1, 28, 28)
    index = torch.arange(len(images), device=images.device)  # (N,)
    return windows[index, shifts[:, 0], shifts[:, 1]]  # (N, 28, 28)


def warp(images: Tensor, warps: Tensor, degrees: float, stretch: float) -> Tensor:
    """Return uint8 (N, 28, 28) rotated by up to `degrees`, sheared, stretched by up to `stretch`.

    `warps` (N, 4) is each image's part of these. Interpolation is bilinear; pixels beyond the frame
    are background (0).
    """
    if not degrees and not stretch:
        return images
    # Each pixel of the result is read at an affine map of its own position, -1 to 1 across the
    # frame. The map is written out for x and y, because the product in `affine_grid` is slow: a
    # batch of matrices three columns wide.
    turn, shear, wide, high = warps.view(-1, 4, 1, 1).unbind(1)  # (N, 1, 1) each
    angle = turn * math.radians(degrees)
    side = images.shape[-1]
    across = (2 * torch.arange(side, device=images.device) + 1) / side - 1  # (28,)
    down = across.view(-1, 1)  # (28, 1)
    grid = torch.empty(len(images), side, side, 2, device=images.device)  # (N, 28, 28, 2): x, y
    torch.add(
        (1 + stretch * wide) * angle.cos() * across,
        (stretch * shear - angle.sin()) * down,
        out=grid[..., 0],
    )
    torch.add(angle.sin() * across, (1 + stretch * high) * angle.cos() * down, out=grid[..., 1])
    pixels = images.unsqueeze(1).float()  # (N, 1, 28, 28)
    warped = functional.grid_sample(pixels, grid, align_corners=False)  # (N, 1, 28, 28)
    return warped.squeeze(1).round().to(torch.uint8)  # (N, 28, 28)


def soften(images: Tensor, every: int) -> Tensor:
    """Return uint8 (N, 28, 28) with the first of each `every` images out of focus; 0: none.

    The blur is the mean of 3 x 3 pixels.
    """
    if not every:
        return images
    result = images.clone()  # (N, 28, 28)
    sharp = images[::every].unsqueeze(1).float()  # (N / every, 1, 28, 28)
    blurred = functional.avg_pool2d(sharp, 3, stride=1, padding=1)  # (N / every, 1, 28, 28)
    result[::every] = blurred.squeeze(1).round().to(torch.uint8)
    return result
