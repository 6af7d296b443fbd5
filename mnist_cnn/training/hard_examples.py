"""Hard examples: the images whose loss was largest when they were last shown, to show again.

Source: Shrivastava, Gupta and Girshick, Training Region-based Object Detectors with Online Hard
Example Mining (2016), https://arxiv.org/abs/1604.03540; here in rounds over a whole data set.
"""

import torch
from torch import Tensor

_LEAST_BATCHES = 10
"""Least batches of a round; with fewer, a small data set's hard images would be memorised."""


class HardExamples:
    """The last loss of every image, and the selection of those to show again.

    A round shows the images whose losses were largest when it began. Newer losses count from the
    next round on, so a checkpoint in the middle of a round holds both. Losses are float16: the
    rounding hides most of the differences between devices and numbers of processes.
    """

    def __init__(self, images: int, share: float, batch_size: int, device: torch.device) -> None:
        batches = max(round(share * images / batch_size), _LEAST_BATCHES)
        self.round_steps = min(batches, images // batch_size)
        """Steps of a round."""
        self._count = self.round_steps * batch_size
        # An image that was never shown counts as hardest.
        self._chosen_by = torch.full((images,), torch.inf, dtype=torch.float16, device=device)
        self._latest = self._chosen_by.clone()  # (N,)

    def note(self, images: Tensor, losses: Tensor) -> None:
        """Record the losses, float (n,), of these images, int64 (n,)."""
        self._latest[images] = losses.to(self._latest.dtype)

    def begin_round(self) -> None:
        """Select by the losses noted so far, until the next round begins."""
        self._chosen_by.copy_(self._latest)

    def choose(self, number: int, order: Tensor) -> Tensor:
        """Return the hard images, int64 (n,) on the device, in the order of a round of an epoch.

        `order`, int64 (N,) on the CPU, is the epoch's permutation; `number` is the round's.
        """
        # The order in which n consecutive numbers occur in a permutation of N is a permutation of
        # n. Each round takes other numbers, so one permutation an epoch serves all of its rounds.
        first = number * self._count % (len(order) - self._count + 1)
        within = order[(order >= first) & (order < first + self._count)] - first  # (n,)
        # A stable sort, because rounding to float16 makes ties.
        hard = self._chosen_by.float().argsort(descending=True, stable=True)[: self._count]  # (n,)
        return hard[within.to(hard.device)]  # (n,)

    def state(self) -> dict[str, Tensor]:
        """Return the live tensors of a checkpoint; copy into them to restore it."""
        return {"losses.chosen_by": self._chosen_by, "losses.latest": self._latest}
