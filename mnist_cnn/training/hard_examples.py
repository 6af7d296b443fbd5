"""Which images are worth showing again: those whose loss was largest when they were last shown.

After Shrivastava, Gupta and Girshick, Training Region-based Object Detectors with Online Hard
Example Mining (2016), https://arxiv.org/abs/1604.03540, with rounds over a whole data set.
"""

import torch
from torch import Tensor

# A round over fewer batches would teach a small data set's hard images by heart.
_LEAST_BATCHES = 10


class HardExamples:
    """The last loss of every image, and the choice among them.

    Choices are made between rounds, from the losses as they were then: a checkpoint in the middle
    of a round holds both those and the newer ones. Losses are kept as float16, whose rounding
    hides most of what the number of processes or the device does to them.
    """

    def __init__(self, images: int, share: float, batch_size: int, place: torch.device) -> None:
        batches = max(round(share * images / batch_size), _LEAST_BATCHES)
        self.round_steps = min(batches, images // batch_size)
        """Steps of a round."""
        self._count = self.round_steps * batch_size
        # What was not shown yet comes first.
        self._chosen_by = torch.full((images,), torch.inf, dtype=torch.float16, device=place)
        self._latest = self._chosen_by.clone()

    def note(self, images: Tensor, losses: Tensor) -> None:
        """Remember the losses (n,) of these images, int64 (n,): each once a round."""
        self._latest[images] = losses.to(self._latest.dtype)

    def begin_round(self) -> None:
        """From here on, choose by the losses noted so far."""
        self._chosen_by.copy_(self._latest)

    def choose(self, number: int, order: Tensor) -> Tensor:
        """Return the hard images in the order of round `number` of an epoch, on the device.

        `order`, int64 (N,) on the CPU, is the epoch's permutation; what it says of each run of as
        many numbers as there are hard images is the permutation of one round.
        """
        first = number * self._count % (len(order) - self._count + 1)
        within = order[(order >= first) & (order < first + self._count)] - first
        hard = self._chosen_by.float().argsort(descending=True, stable=True)[: self._count]
        return hard[within.to(hard.device)]

    def state(self) -> dict[str, Tensor]:
        """Return the live tensors that a checkpoint must hold; copy into them to restore."""
        return {"losses.chosen_by": self._chosen_by, "losses.latest": self._latest}
