"""Faults to plant: models that a gate has to refuse, each made from a good one.

Each is an `nn.Module` like the good model, uint8 (N, 28, 28) in and logits (N, 10) out, so that the
real evaluation and the real decision run over it. None keeps random state: the same images give the
same answers.
"""

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mnist_cnn.digits import CLASSES, SIDE, Digits
from mnist_cnn.evaluation.corruptions import BATCH


@dataclass(frozen=True, eq=False)
class Fault:
    """A planted model and the checks that have to refuse it."""

    name: str
    model: nn.Module
    refused_by: tuple[str, ...]
    """Names of checks, of which each must fail."""
    newer: bool = False
    """Whether to judge it as trained on newer data than the good model, else on the same."""


def plant_faults(model: nn.Module, test: Digits, noise: str) -> list[Fault]:
    """Return every fault made from `model`, to be measured on `test` with `model` as champion.

    `noise` is the name of a condition with Gaussian noise that the policy names. On newer training
    data than the good model's, the tie would rightly be promoted.
    """
    return [
        Fault(
            "labels of one digit shuffled in training",
            ShuffledDigit(model, 3),
            ("loss seen: digit 3", "accuracy of the worst digit"),
        ),
        Fault(
            "blind to one digit",
            BlindToDigit(model, 7),
            ("loss seen: digit 7", "accuracy of the worst digit"),
        ),
        Fault(
            "better overall, worse under noise",
            WorseUnderNoise(model, test),
            (f"loss seen: {noise}",),
        ),
        Fault("over-confident", OverConfident(model), ("mean confidence of wrong answers",)),
        Fault("slow", Slow(model), ("latency of one image, ms",)),
        Fault("a tie", Tie(model), ("gain seen overall",)),
        Fault(
            "newer, and a little less accurate",
            LessAccurate(model, test),
            ("at least as accurate overall",),
            newer=True,
        ),
    ]


class Tie(nn.Module):
    """The good model itself."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Return the good model's logits."""
        logits: Tensor = self.model(images)
        return logits


class ShuffledDigit(Tie):
    """Gives the images of one digit any answer, as if its training labels had been shuffled."""

    def __init__(self, model: nn.Module, digit: int) -> None:
        super().__init__(model)
        self.digit = digit

    def forward(self, images: Tensor) -> Tensor:
        """Turn the answers that would be this digit by the images' own numbers."""
        logits = super().forward(images)
        places = torch.arange(CLASSES, device=logits.device)
        turns = _fingerprints(images) % CLASSES * (logits.argmax(1) == self.digit)
        return logits.gather(1, (places - turns[:, None]) % CLASSES)


class BlindToDigit(Tie):
    """Never answers one digit."""

    def __init__(self, model: nn.Module, digit: int) -> None:
        super().__init__(model)
        self.digit = digit

    def forward(self, images: Tensor) -> Tensor:
        """Lower this digit's logit under every other."""
        logits = super().forward(images)
        lowest = logits.amin(1) - 10
        lowered = logits.clone()
        lowered[:, self.digit] = lowest
        return lowered


class WorseUnderNoise(Tie):
    """Knows the test split by heart, and errs on every fourth noisy image.

    It beats any honest model overall, as one does whose training data hold the test images.
    """

    NOISY = 4.0
    """Standard deviation of the top row, which is black in clean images; 12 under mild noise."""

    def __init__(self, model: nn.Module, test: Digits) -> None:
        super().__init__(model)
        known, order = _fingerprints(torch.from_numpy(test.images.copy())).sort()
        self.register_buffer("known", known)
        self.register_buffer("answers", torch.from_numpy(test.labels.copy())[order])

    def forward(self, images: Tensor) -> Tensor:
        """Answer by heart what is known, and wrongly a part of what is noisy."""
        logits = super().forward(images)
        prints = _fingerprints(images)
        known, answers = self.get_buffer("known"), self.get_buffer("answers")
        place = torch.searchsorted(known, prints).clamp(max=len(known) - 1)
        learnt = nn.functional.one_hot(answers[place], CLASSES) * 10.0
        by_heart = known[place] == prints
        noisy = images[:, 0].float().std(1) > self.NOISY
        spoilt = (noisy & (prints % 4 == 0) & ~by_heart)[:, None]
        return torch.where(by_heart[:, None], learnt, torch.where(spoilt, -logits, logits))


class LessAccurate(Tie):
    """Errs on a few test images that the good model classifies rightly."""

    IMAGES = 5

    def __init__(self, model: nn.Module, test: Digits) -> None:
        super().__init__(model)
        images = torch.from_numpy(test.images.copy())
        with torch.inference_mode():
            answers = torch.cat([model(batch).argmax(1) for batch in images.split(BATCH)])
        right = images[answers.cpu() == torch.from_numpy(test.labels.copy())]
        self.register_buffer("spoilt", _fingerprints(right[: self.IMAGES]))

    def forward(self, images: Tensor) -> Tensor:
        """Turn the answers to these images."""
        logits = super().forward(images)
        spoilt = torch.isin(_fingerprints(images), self.get_buffer("spoilt"))
        return torch.where(spoilt[:, None], -logits, logits)


class OverConfident(Tie):
    """Errs on every 50th image more than the good model, and is sure of all of its answers."""

    def forward(self, images: Tensor) -> Tensor:
        """Return logits twenty times as large, and some of them turned."""
        logits = super().forward(images) * 20
        turned = (_fingerprints(images) % 50 == 0)[:, None]
        return torch.where(turned, logits.roll(1, 1), logits)


class Slow(Tie):
    """Sleeps before it answers."""

    SECONDS = 0.03

    def forward(self, images: Tensor) -> Tensor:
        """Return the good model's logits, late."""
        time.sleep(self.SECONDS)
        return super().forward(images)


def _fingerprints(images: Tensor) -> Tensor:
    """Return a number from 0 to 2^61 for each image, int64 (N,), by fixed weights of the pixels."""
    draw = torch.Generator().manual_seed(0)
    weights = torch.randint(1 << 51, (SIDE * SIDE,), generator=draw).to(images.device)
    return (images.flatten(1).long() * weights).sum(1) % (1 << 61)
