"""Paired comparison of two models on the same images: tests and limits of their difference.

An image that both models classify correctly, or both wrongly, is no evidence for either. The
evidence is in the gains (the candidate alone is right) and the losses (the champion alone is).
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Paired:
    """Counts of the images on which two models differ."""

    images: int
    gains: int
    """Images that only the candidate classifies correctly."""
    losses: int
    """Images that only the champion classifies correctly."""

    def __post_init__(self) -> None:
        assert self.images > 0, self
        assert min(self.gains, self.losses) >= 0, self
        assert self.gains + self.losses <= self.images, self

    @property
    def difference(self) -> float:
        """Accuracy of the candidate less accuracy of the champion, -1 to 1."""
        return (self.gains - self.losses) / self.images


def pair(candidate: NDArray[np.bool_], champion: NDArray[np.bool_]) -> Paired:
    """Count gains and losses from the correct images of each model, bool (N,), in the same order.

    Raises ValueError for arrays that are empty, of unequal length or not boolean.
    """
    for name, right in (("candidate", candidate), ("champion", champion)):
        if right.dtype != np.bool_ or right.ndim != 1:
            raise ValueError(
                f"the {name}'s outcomes are {right.dtype} of shape {right.shape}; "
                "expected bool of shape (N,): one 'was it right' for each image"
            )
    if len(candidate) != len(champion) or not len(candidate):
        raise ValueError(
            f"the candidate has outcomes of {len(candidate)} images, the champion of "
            f"{len(champion)}; expected the same images, at least one: evaluate both on one split"
        )
    gains = int((candidate & ~champion).sum())
    losses = int((champion & ~candidate).sum())
    return Paired(len(candidate), gains, losses)


def p_not_better(paired: Paired) -> float:
    """Return the one-sided p-value of the hypothesis that the candidate is not better.

    McNemar's test in its exact form: if the models are equally good, each discordant image is a
    fair coin. Source: McNemar 1947, doi:10.1007/BF02295996; exact and conditional as in Fagerland,
    Lydersen and Laake 2013, doi:10.1186/1471-2288-13-91. Without a discordant image it is 1.
    """
    from scipy.stats import binomtest

    discordant = paired.gains + paired.losses
    if not discordant:
        return 1.0
    return float(binomtest(paired.gains, discordant, 0.5, alternative="greater").pvalue)


def p_not_above(paired: Paired, difference: float) -> float:
    """Return the one-sided p-value of the hypothesis that the true difference is <= `difference`.

    A parametric bootstrap whose distribution is summed instead of drawn, because levels of 1e-5
    are out of reach for drawing: gains and losses are Poisson counts with the means that are most
    likely under the hypothesis, and the p-value is the chance of a net gain as high as the one
    seen. Sources: means restricted by the hypothesis, Tango 1998, Stat. Med. 17:891; p-values
    estimated with them, Lloyd and Moldovan 2008, doi:10.1002/sim.3229. Unlike a normal
    approximation it holds for a handful of discordant images: for losses of 0.1 to 2 points and
    levels from 0.05 down to 2e-5 the chance to err was 0.83 to 0.96 of the level. The counts are
    multinomial; Poisson has the larger variance, so the error is on the side of no evidence.
    """
    shift = difference * paired.images  # mean of gains less mean of losses
    # Under the hypothesis the means are m + shift (gains) and m (losses). Their log-likelihood,
    # gains ln(m + shift) + losses ln m - 2 m - shift, is greatest at the larger root of
    # 2 m^2 - (gains + losses - 2 shift) m - losses shift = 0.
    half = paired.gains + paired.losses - 2 * shift
    # The discriminant, written as two terms of which neither is negative, so that rounding cannot
    # make it so.
    root = math.sqrt(
        (paired.gains - paired.losses - 2 * shift) ** 2 + 4 * paired.gains * paired.losses
    )
    losses = max((half + root) / 4, -shift, 0.0)  # neither mean is negative
    return _tail(paired.gains - paired.losses, max(losses + shift, 0.0), losses)


def lower_limit(paired: Paired, level: float) -> float:
    """Return the least difference that is not refuted at `level`, one-sided, -1 to 1.

    The true difference lies above it with confidence 1 - `level`. It inverts the test of
    `p_not_above` (a test-inversion bootstrap interval, Carpenter 1999,
    doi:10.1111/1467-9868.00169).
    """
    from scipy.optimize import brentq

    if p_not_above(paired, -1) >= level:
        return -1.0
    # The p-value rises with the difference: below `level` at -1, above it at the difference seen.
    return float(
        brentq(lambda at: p_not_above(paired, at) - level, -1, paired.difference, xtol=1e-9)
    )


def upper_limit(paired: Paired, level: float) -> float:
    """Return the greatest difference that is not refuted at `level`; see `lower_limit`."""
    # With the models exchanged, gains are losses and the difference changes its sign.
    return -lower_limit(Paired(paired.images, paired.losses, paired.gains), level)


def images_to_prove(margin: float, level: float) -> int:
    """Return the number of images that prove a loss below `margin` if not one loss is seen."""
    # A true loss of `margin` leaves n images without one with probability exp(-margin n).
    return math.ceil(-math.log(level) / margin)


def _tail(net: int, gains: float, losses: float) -> float:
    """Return the chance that gains less losses, Poisson with these means, is at least `net`.

    By the identity of the Skellam and the noncentral chi-squared distribution (Johnson 1959,
    doi:10.1093/biomet/46.3-4.352); `scipy.stats.skellam` is the same 40 times slower.
    """
    from scipy.special import chndtr

    if net > 0:
        return float(chndtr(2 * gains, 2 * net, 2 * losses))
    return float(1 - chndtr(2 * losses, 2 * (1 - net), 2 * gains))
