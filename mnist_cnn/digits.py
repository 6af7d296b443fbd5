"""Digits in memory, and the two formats that they are read from."""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SIDE = 28
"""Height and width of an image, pixels."""

CLASSES = 10
"""The digits 0 to 9."""


@dataclass(frozen=True, eq=False)
class Digits:
    """Labelled images of one split.

    `images` is uint8 (N, 28, 28), 0 for background and 255 for ink; `labels` is int64 (N,), each
    0 to 9. Raises ValueError on anything else.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def __post_init__(self) -> None:
        if self.images.dtype != np.uint8 or self.images.shape[1:] != (SIDE, SIDE):
            raise ValueError(
                f"images are {self.images.dtype} of shape {self.images.shape}; "
                f"expected uint8 of shape (N, {SIDE}, {SIDE})"
            )
        if self.labels.dtype != np.int64 or self.labels.ndim != 1:
            raise ValueError(
                f"labels are {self.labels.dtype} of shape {self.labels.shape}; "
                "expected int64 of shape (N,)"
            )
        if len(self.images) != len(self.labels):
            raise ValueError(
                f"{len(self.images)} images but {len(self.labels)} labels; expected one label "
                "for each image: check that both files belong to the same split"
            )
        outside = self.labels[(self.labels < 0) | (self.labels >= CLASSES)]
        if len(outside):
            raise ValueError(
                f"{len(outside)} labels are outside 0-9, the first is {outside[0]}; "
                "expected the digits 0 to 9"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, start: int, stop: int) -> "Digits":
        """Return images and labels `start` to `stop` without copying them."""
        return Digits(self.images[start:stop], self.labels[start:stop])

    def digest(self) -> str:
        """Return the sha256 of shapes, images and labels as 64 hexadecimal characters."""
        state = hashlib.sha256(f"{self.images.shape}".encode())
        state.update(np.ascontiguousarray(self.images).data)
        state.update(np.ascontiguousarray(self.labels).data)
        return state.hexdigest()
