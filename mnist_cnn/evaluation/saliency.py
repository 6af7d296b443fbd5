"""Saliency by occlusion: the dependence of a prediction on each region of an image."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mnist_cnn.digits import SIDE
from mnist_cnn.evaluation.outcomes import predict
from mnist_cnn.styles import Floats

PATCH = 5
"""Side of the square that is hidden, px."""


def map_saliency(model: nn.Module, images: NDArray[np.uint8]) -> Floats:
    """Return the loss of probability from hiding each region: float64 (N, 28, 28).

    `images` is uint8 (N, 28, 28). A square of `PATCH` pixels is set to background at every position
    in turn. A pixel's value is the mean loss of the predicted digit's probability over the squares
    that hid it, -1 to 1. Needs no gradient, so it works for a loaded program too.
    Source: Zeiler and Fergus 2014, arXiv:1311.2901.
    """
    positions = SIDE - PATCH + 1  # 24 along each side
    corner = torch.arange(positions)
    inside = torch.arange(SIDE)
    covers = (inside >= corner[:, None]) & (inside < corner[:, None] + PATCH)  # (24, 28)
    # Rows covered by one corner and columns covered by another: every square of the image.
    squares = (covers[:, None, :, None] & covers[None, :, None, :]).reshape(-1, SIDE, SIDE)
    hidden = squares.numpy()  # (576, 28, 28)
    maps = []
    for image in images:
        whole = predict(model, image[None])[0]  # (10,)
        digit = int(whole.argmax())
        partly = predict(model, np.where(hidden, np.uint8(0), image))  # (576, 10)
        loss = whole[digit] - partly[:, digit]  # (576,)
        # Fewer squares cover a pixel at the edge, so its sum has a smaller divisor.
        maps.append(np.tensordot(loss.astype(np.float64), hidden, 1) / hidden.sum(0))  # (28, 28)
    return np.stack(maps)
