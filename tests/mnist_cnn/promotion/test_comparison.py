import math
from itertools import pairwise, product

import numpy as np
import pytest
from scipy.stats import poisson, skellam

from mnist_cnn.promotion.comparison import (
    Paired,
    images_to_prove,
    lower_limit,
    p_not_above,
    p_not_better,
    pair,
    upper_limit,
)

COUNTS = [
    Paired(images, gains, losses)
    for images, gains, losses in product((40, 1000, 10_000), (0, 1, 3, 12), (0, 1, 2, 17))
]


def test_gains_and_losses_are_counted() -> None:
    candidate = np.array([True, True, True, False, False, True])
    champion = np.array([True, False, False, True, False, True])
    paired = pair(candidate, champion)
    assert paired == Paired(images=6, gains=2, losses=1)
    assert paired.difference == pytest.approx(1 / 6)


def test_the_difference_is_that_of_the_accuracies() -> None:
    draw = np.random.default_rng(0)
    for _ in range(50):
        ours, theirs = draw.random((2, 300)) < draw.random((2, 1))
        assert pair(ours, theirs).difference == pytest.approx(ours.mean() - theirs.mean())


@pytest.mark.parametrize(
    ("ours", "theirs", "sentence"),
    [
        (np.ones(3, bool), np.ones(4, bool), "outcomes of 3 images, the champion of 4"),
        (np.ones(0, bool), np.ones(0, bool), "at least one"),
        (np.ones(3), np.ones(3, bool), "the candidate's outcomes are float64"),
        (np.ones(3, bool), np.ones((3, 2), bool), "the champion's outcomes are bool of shape"),
    ],
)
def test_outcomes_that_do_not_pair_are_refused(
    ours: np.ndarray, theirs: np.ndarray, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        pair(ours, theirs)


@pytest.mark.parametrize(
    ("gains", "losses", "expected"),
    [
        (0, 0, 1.0),
        (5, 0, 1 / 32),
        (0, 5, 1.0),
        (1, 1, 3 / 4),
        (3, 1, 5 / 16),  # (4 + 1) of 16 sequences of four coins
        (8, 2, 56 / 1024),  # 45 + 10 + 1
    ],
)
def test_mcnemar_agrees_with_coins_counted_by_hand(
    gains: int, losses: int, expected: float
) -> None:
    assert p_not_better(Paired(100, gains, losses)) == pytest.approx(expected)


def test_mcnemar_does_not_ask_about_images_on_which_both_agree() -> None:
    assert p_not_better(Paired(20, 9, 3)) == p_not_better(Paired(10_000, 9, 3))


def test_the_two_directions_of_mcnemar_overlap_in_what_was_seen() -> None:
    """P(gains >= g) + P(gains <= g) = 1 + P(gains = g)."""
    for paired in COUNTS:
        there = p_not_better(paired)
        back = p_not_better(Paired(paired.images, paired.losses, paired.gains))
        discordant = paired.gains + paired.losses
        seen = math.comb(discordant, paired.gains) / 2**discordant
        assert there + back == pytest.approx(1 + seen)


@pytest.mark.parametrize("expected", [5, 10, 20])
def test_without_a_discordant_image_the_chance_is_that_of_no_loss(expected: int) -> None:
    """Under a true loss of `expected` images, no loss and no gain is seen once in e^expected."""
    p = p_not_above(Paired(1000, 0, 0), -expected / 1000)
    assert p == pytest.approx(math.exp(-expected), rel=1e-6)


def test_no_discordant_image_gives_the_rule_of_three() -> None:
    """At level 0.05 it is log(20) / N = 3 / N (Hanley and Lippman-Hand 1983)."""
    paired = Paired(1000, 0, 0)
    assert lower_limit(paired, 0.05) == pytest.approx(-math.log(20) / 1000, abs=1e-8)
    assert upper_limit(paired, 0.05) == pytest.approx(math.log(20) / 1000, abs=1e-8)


def test_the_p_value_is_the_skellam_tail_at_the_likeliest_means() -> None:
    """Gains 2, losses 5, a loss of 10 asked about: 2/x + 5/(x + 10) = 2, or 2x^2 + 13x - 20 = 0."""
    gains = (-13 + math.sqrt(13**2 + 8 * 20)) / 4
    expected = skellam.sf(-4, gains, gains + 10)  # P(net > -4) = P(net >= -3)
    assert p_not_above(Paired(1000, 2, 5), -10 / 1000) == pytest.approx(expected, rel=1e-9)


def test_the_means_of_the_p_value_are_the_likeliest() -> None:
    """A search over a grid finds no likelier means, and the same p-value at the best of them."""
    for gains, losses, margin in [(3, 5, 10), (25, 23, 10), (1, 0, 20), (12, 17, 3)]:
        grid = np.linspace(1e-6, 80, 800_001)
        likelihood = poisson.logpmf(gains, grid) + poisson.logpmf(losses, grid + margin)
        best = grid[likelihood.argmax()]
        expected = skellam.sf(gains - losses - 1, best, best + margin)
        found = p_not_above(Paired(10_000, gains, losses), -margin / 10_000)
        assert found == pytest.approx(expected, rel=1e-3)


def test_the_p_value_grows_with_the_difference_that_is_asked_about() -> None:
    for paired in COUNTS:
        asked = np.linspace(-0.9, 0.9, 61)
        values = [p_not_above(paired, difference) for difference in asked]
        assert all(before <= after + 1e-12 for before, after in pairwise(values)), paired
        assert all(0 <= value <= 1 for value in values), paired


def test_a_gain_more_never_weakens_and_a_loss_more_never_strengthens_the_proof() -> None:
    for paired in COUNTS:
        gained = Paired(paired.images, paired.gains + 1, paired.losses)
        lost = Paired(paired.images, paired.gains, paired.losses + 1)
        for level in (0.05, 1e-4):
            limit = lower_limit(paired, level)
            assert lower_limit(lost, level) < limit, paired
            assert p_not_better(gained) <= p_not_better(paired) <= p_not_better(lost), paired
            assert upper_limit(gained, level) > upper_limit(paired, level), paired


def test_a_stricter_level_widens_the_interval_around_the_difference() -> None:
    for paired in COUNTS:
        wide = lower_limit(paired, 1e-5), upper_limit(paired, 1e-5)
        narrow = lower_limit(paired, 0.05), upper_limit(paired, 0.05)
        assert -1 <= wide[0] <= narrow[0] <= paired.difference <= narrow[1] <= wide[1] <= 1, paired


def test_swapping_the_models_mirrors_the_interval() -> None:
    for paired in COUNTS:
        mirrored = Paired(paired.images, paired.losses, paired.gains)
        assert lower_limit(mirrored, 0.01) == pytest.approx(-upper_limit(paired, 0.01))


def test_the_limit_is_where_the_test_turns() -> None:
    for paired in COUNTS:
        limit = lower_limit(paired, 0.01)
        if limit > -1:
            assert p_not_above(paired, limit - 1e-5) < 0.01 < p_not_above(paired, limit + 1e-5)


def test_the_limit_agrees_with_the_normal_one_where_images_abound() -> None:
    paired = Paired(1_000_000, 21_000, 20_000)
    normal = paired.difference - 1.959964 * math.sqrt(41_000) / 1_000_000
    assert lower_limit(paired, 0.025) == pytest.approx(normal, rel=0.01)


@pytest.mark.parametrize("level", [0.05, 0.0083, 4.5e-4])
@pytest.mark.parametrize(
    ("images", "margin", "gains"),
    [(1000, 0.02, 0.5), (1000, 0.02, 5), (10_000, 0.001, 2), (10_000, 0.001, 25)],
)
def test_a_model_worse_by_the_margin_passes_no_more_often_than_the_level(
    images: int, margin: float, gains: float, level: float
) -> None:
    """Counted out over every pair of gains and losses that can happen, not drawn."""
    lost = gains + margin * images
    size = 0.0
    for seen in range(int(gains + 8 * math.sqrt(gains) + 8)):
        passing = -1  # most losses with which the test still passes; p grows with losses
        while p_not_above(Paired(images, seen, passing + 1), -margin) <= level:
            passing += 1
        size += poisson.pmf(seen, gains) * poisson.cdf(passing, lost)
    assert 0.2 * level < size <= level  # counts are whole, so that a level is never used up


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """2,000 test splits of two models whose discordant images are as frequent as real ones."""
    draw = np.random.default_rng(7)
    for difference in (-0.002, 0.0, 0.002):
        rates = [0.0025 + max(difference, 0), 0.0025 + max(-difference, 0)]
        counts = draw.multinomial(10_000, [*rates, 1 - sum(rates)], size=2000)
        inside = 0
        for gains, losses, _ in counts.tolist():
            paired = Paired(10_000, gains, losses)
            inside += lower_limit(paired, 0.025) <= difference <= upper_limit(paired, 0.025)
        assert 0.945 <= inside / 2000 <= 0.97, difference


@pytest.mark.parametrize(("margin", "level"), [(0.001, 0.025), (0.02, 1e-4)])
def test_fewer_images_than_needed_prove_nothing(margin: float, level: float) -> None:
    needed = images_to_prove(margin, level)
    assert lower_limit(Paired(needed, 0, 0), level) >= -margin
    assert lower_limit(Paired(needed - 1, 0, 0), level) < -margin
