"""Faulty models that a gate has to refuse, each made from a good one.

Each is an `nn.Module` like the good model, uint8 (N, 28, 28) in and logits (N, 10) out, so that the
real evaluation and the real decision run over it. None keeps random state: the same images give the
same logits.
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
    """Names of the checks that must fail, every one of them."""
    newer: bool = False
    """True: to be judged as trained on newer data than the good model; False: on the same."""


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
    """Scatters the predictions of one digit, as if its training labels had been shuffled."""

    def __init__(self, model: nn.Module, digit: int) -> None:
        super().__init__(model)
        self.digit = digit

    def forward(self, images: Tensor) -> Tensor:
        """Rotate the logits of images predicted as this digit, by each image's fingerprint."""
        logits = super().forward(images)  # (N, 10)
        classes = torch.arange(CLASSES, device=logits.device)  # (10,)
        # 0 for the images predicted as another digit, which keep their logits.
        turns = _fingerprints(images) % CLASSES * (logits.argmax(1) == self.digit)  # (N,)
        return logits.gather(1, (classes - turns[:, None]) % CLASSES)


class BlindToDigit(Tie):
    """Never predicts one digit."""

    def __init__(self, model: nn.Module, digit: int) -> None:
        super().__init__(model)
        self.digit = digit

    def forward(self, images: Tensor) -> Tensor:
        """Lower this digit's logit under every other."""
        logits = super().forward(images)
        lowest = logits.amin(1) - 10  # (N,)
        lowered = logits.clone()
        lowered[:, self.digit] = lowest
        return lowered


class WorseUnderNoise(Tie):
    """Memorises the test split, and errs on every fourth noisy image.

    It beats any honest model overall, as does one whose training data contain the test images.
    """

    NOISY = 4.0
    """Least standard deviation of the top row in a noisy image. The row is black in clean images;
    under mild noise the deviation is 12."""

    def __init__(self, model: nn.Module, test: Digits) -> None:
        super().__init__(model)
        # Sorted, so that `forward` finds a fingerprint by binary search.
        known, order = _fingerprints(torch.from_numpy(test.images.copy())).sort()
        self.register_buffer("known", known)
        self.register_buffer("answers", torch.from_numpy(test.labels.copy())[order])

    def forward(self, images: Tensor) -> Tensor:
        """Return the memorised label of a test image; negate the logits of some noisy images."""
        logits = super().forward(images)  # (N, 10)
        prints = _fingerprints(images)  # (N,)
        known = self.get_buffer("known")  # (test images,)
        answers = self.get_buffer("answers")  # (test images,)
        # A fingerprint above all known ones is compared with the last, which it does not match.
        index = torch.searchsorted(known, prints).clamp(max=len(known) - 1)  # (N,)
        memorised = known[index] == prints  # (N,)
        learnt = nn.functional.one_hot(answers[index], CLASSES) * 10.0  # (N, 10)
        noisy = images[:, 0].float().std(1) > self.NOISY  # (N,)
        spoilt = (noisy & (prints % 4 == 0) & ~memorised)[:, None]  # (N, 1)
        return torch.where(memorised[:, None], learnt, torch.where(spoilt, -logits, logits))


class LessAccurate(Tie):
    """Errs on a few test images that the good model classifies correctly."""

    IMAGES = 5
    """Number of these images."""

    def __init__(self, model: nn.Module, test: Digits) -> None:
        super().__init__(model)
        images = torch.from_numpy(test.images.copy())
        with torch.inference_mode():
            answers = torch.cat([model(batch).argmax(1) for batch in images.split(BATCH)])
        right = images[answers.cpu() == torch.from_numpy(test.labels.copy())]
        self.register_buffer("spoilt", _fingerprints(right[: self.IMAGES]))

    def forward(self, images: Tensor) -> Tensor:
        """Negate the logits of these images, so that the least likely digit is predicted."""
        logits = super().forward(images)
        spoilt = torch.isin(_fingerprints(images), self.get_buffer("spoilt"))
        return torch.where(spoilt[:, None], -logits, logits)


class OverConfident(Tie):
    """Errs on one image in 50 more than the good model, with high confidence everywhere."""

    def forward(self, images: Tensor) -> Tensor:
        """Return logits twenty times as large, rotated by one digit for some of the images."""
        logits = super().forward(images) * 20
        turned = (_fingerprints(images) % 50 == 0)[:, None]  # (N, 1)
        return torch.where(turned, logits.roll(1, 1), logits)


class Slow(Tie):
    """Sleeps before it classifies."""

    SECONDS = 0.03

    def forward(self, images: Tensor) -> Tensor:
        """Return the good model's logits after `SECONDS`."""
        time.sleep(self.SECONDS)
        return super().forward(images)


def _fingerprints(images: Tensor) -> Tensor:
    """Return a number below 2^61 for each image, int64 (N,), by fixed weights of the pixels."""
    draw = torch.Generator().manual_seed(0)
    weights = torch.randint(1 << 51, (SIDE * SIDE,), generator=draw).to(images.device)  # (784,)
    # The sum may wrap around at 2^64. As 2^61 divides that, the remainder stays the same.
    return (images.flatten(1).long() * weights).sum(1) % (1 << 61)
