"""Where a model looks: how much its answer depends on each place of an image."""

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
    """Return how far hiding each place lowers the probability of the answer: (N, 28, 28).

    A square of `PATCH` pixels is set to background at every place in turn; a pixel's value is the
    mean over the squares that hid it, -1 to 1. Needs no gradient, so that it works for a loaded
    program too. Source: Zeiler and Fergus 2014, arXiv:1311.2901.
    """
    places = SIDE - PATCH + 1
    corner = torch.arange(places)
    inside = torch.arange(SIDE)
    covers = (inside >= corner[:, None]) & (inside < corner[:, None] + PATCH)  # (24, 28)
    squares = (covers[:, None, :, None] & covers[None, :, None, :]).reshape(-1, SIDE, SIDE)
    hidden = squares.numpy()
    maps = []
    for image in images:
        whole = predict(model, image[None])[0]
        answer = int(whole.argmax())
        loss = whole[answer] - predict(model, np.where(hidden, np.uint8(0), image))[:, answer]
        maps.append(np.tensordot(loss.astype(np.float64), hidden, 1) / hidden.sum(0))
    return np.stack(maps)
