"""Decide whether a candidate replaces the champion: a pure function of two sets of outcomes.

Floors bind every candidate. Against a champion no loss beyond a margin may be seen, and a promotion
needs a proof. A borderline case, with some evidence but no proof, is for a person to decide. The
README of this room gives the reasons, and the correction that each test needs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from mnist_cnn.digits import CLASSES
from mnist_cnn.promotion.comparison import (
    Paired,
    images_to_prove,
    lower_limit,
    p_not_better,
    pair,
    upper_limit,
)
from mnist_cnn.promotion.policy import PromotionPolicy
from mnist_cnn.record import Record

Verdict = Literal["promote", "keep", "needs-approval"]
Kind = Literal["policy", "floor", "loss", "evidence", "benefit", "offer"]
Outcomes = NDArray[np.bool_]

# Names of the checks of kind `benefit`, by which `_conclude` finds them.
_GAIN = "gain seen overall"
_SUPERIOR = "superior overall"
_NEWER = "newer training data"


@dataclass(frozen=True, eq=False)
class Scored:
    """One model's outcomes on a test split, and the figures that its floors need.

    `right`, bool (N,), marks the images that were classified correctly; `labels`, int64 (N,), holds
    the true digits; `factors` holds an array like `right` for each condition, whose length may be
    another, but the same for both models. A figure that is None was not measured. Raises ValueError
    if `right` and `labels` do not fit, or if `data_until` has no time zone.
    """

    model: str
    """Address of the model."""
    snapshot: str
    """Digest of the snapshot whose test split was measured."""
    test_split: str
    """Digest of the test images and labels themselves; unchanged when only training data arrive."""
    labels: NDArray[np.int64]
    right: Outcomes
    factors: Mapping[str, Outcomes]
    data_until: datetime | None
    """Time of acceptance of the newest batch in the training data. None without any batch: the base
    data set alone, which is older than every batch."""
    shifted_prior_accuracy: float | None
    """Accuracy under the worst label priors; see `mnist_cnn.evaluation.factors.reweight`."""
    calibration_error: float | None
    error_confidence: float | None
    """Mean confidence of the wrong answers; None also where none is wrong."""
    latency_ms: float | None
    size_bytes: int | None

    def __post_init__(self) -> None:
        if self.right.dtype != np.bool_ or self.right.shape != self.labels.shape or not self.images:
            raise ValueError(
                f"{self.model} has outcomes {self.right.dtype} of shape {self.right.shape} for "
                f"labels of shape {self.labels.shape}; expected bool, one for each of at least one "
                "label: evaluate it again"
            )
        if self.data_until and self.data_until.tzinfo is None:
            raise ValueError(
                f"{self.model} was trained on data until {self.data_until}, without a time zone; "
                "expected one, so that two models can be put in order"
            )

    @property
    def images(self) -> int:
        """Number of test images."""
        return len(self.labels)


@dataclass(frozen=True)
class ReuseHistory:
    """Candidates on which this test split has decided before."""

    test_split: str
    candidates: tuple[str, ...] = ()
    """Addresses of the models in order, repeats allowed: a retried decision is counted once."""

    def count(self, candidate: str) -> int:
        """Return the number of the decision on `candidate` on this test split, from 1."""
        seen = list(dict.fromkeys(self.candidates))  # without repeats, in order
        return (seen.index(candidate) if candidate in seen else len(seen)) + 1


class Check(BaseModel, frozen=True):
    """One requirement of a candidate, its measured value and the result."""

    name: str
    kind: Kind
    observed: float | None
    """None if it was not measured; the check then fails."""
    threshold: float
    passed: bool
    sentence: str


class Comparison(BaseModel, frozen=True):
    """Candidate against champion: overall, in one digit, or under one condition."""

    place: str
    """`overall`, a digit such as `digit 3`, or a condition such as `slant=-15`."""
    images: int
    gains: int
    """Images that only the candidate classifies correctly."""
    losses: int
    """Images that only the champion classifies correctly."""
    difference: float
    """Accuracy of the candidate less accuracy of the champion, -1 to 1."""
    low: float
    """Lower limit of the difference at the decision's level, one-sided."""
    high: float
    """Upper limit, likewise."""
    margin: float
    """Loss that the policy tolerates."""


class Decision(Record):
    """The verdict on a candidate, with every check that led to it."""

    verdict: Verdict
    reason: str
    checks: list[Check]
    comparisons: list[Comparison]
    candidate: str
    champion: str | None
    snapshot: str
    test_split: str
    decisions: int
    """Number of decisions on this test split, including this one."""
    level: float
    """Significance level of every test in this decision, one-sided."""


def evidence_level(alpha: float, decision: int) -> float:
    """Return the significance level of the k-th decision on one test split, alpha / (k (k + 1))."""
    # The levels of the first k decisions sum to alpha k / (k + 1), which is always below alpha.
    return alpha / (decision * (decision + 1))


def decide(
    candidate: Scored,
    champion: Scored | None,
    policy: PromotionPolicy | None,
    history: ReuseHistory,
) -> Decision:
    """Decide on a candidate under `policy`, against the champion where there is one.

    Raises ValueError if the two, or the history, are of different test splits, or the two of
    different snapshots, image counts or labels, because then their difference has no meaning.
    """
    _require_same_images(candidate, champion, history)
    decisions = history.count(candidate.model)
    level = evidence_level(policy.alpha, decisions) if policy else 0.0
    checks = [_policy_check(policy)]
    comparisons: list[Comparison] = []
    if policy:
        checks += _floors(candidate, policy)
    if policy and champion:
        comparisons, missing = _compare(candidate, champion, policy, level)
        checks += _against(candidate, champion, comparisons, policy.alpha, level) + missing
    verdict, reason = _conclude(checks, champion)
    return Decision(
        verdict=verdict,
        reason=reason,
        checks=checks,
        comparisons=comparisons,
        candidate=candidate.model,
        champion=champion.model if champion else None,
        snapshot=candidate.snapshot,
        test_split=candidate.test_split,
        decisions=decisions,
        level=level,
    )


def _require_same_images(candidate: Scored, champion: Scored | None, history: ReuseHistory) -> None:
    if history.test_split != candidate.test_split:
        raise ValueError(
            f"the history is of test split {history.test_split}, the candidate was measured on "
            f"{candidate.test_split}; expected the same: read the history of that split"
        )
    if not champion:
        return
    for field in ("snapshot", "test_split", "images"):
        ours = getattr(candidate, field)
        theirs = getattr(champion, field)
        if ours != theirs:
            raise ValueError(
                f"the candidate was measured on {field.replace('_', ' ')} {ours}, the champion on "
                f"{theirs}; expected the same: evaluate both again on one snapshot"
            )
    if not np.array_equal(candidate.labels, champion.labels):
        raise ValueError(
            "candidate and champion were measured with different labels; expected the same images "
            "in the same order: evaluate both again on one snapshot"
        )


def _policy_check(policy: PromotionPolicy | None) -> Check:
    named = len(policy.factor_floors) if policy else 0
    if not policy:
        sentence = "there is no policy; without one nothing is promoted: state a PromotionPolicy"
    elif not named:
        sentence = (
            "the policy is empty: it names no factor in factor_floors, so nothing is promoted"
        )
    else:
        sentence = f"the policy names {named} conditions beside its floors for the whole"
    return Check(
        name="policy",
        kind="policy",
        observed=named,
        threshold=1,
        passed=named > 0,
        sentence=sentence,
    )


def _floors(scored: Scored, policy: PromotionPolicy) -> list[Check]:
    # The share of each digit's images that is classified correctly.
    recalls = {
        digit: float(scored.right[scored.labels == digit].mean())
        for digit in range(CLASSES)
        if (scored.labels == digit).any()
    }
    worst = min(recalls, key=recalls.__getitem__)
    # A model without errors has no wrong answer whose confidence could be measured: it passes.
    never_wrong = scored.right.all() and scored.error_confidence is None
    checks = [
        _bound("accuracy", float(scored.right.mean()), policy.accuracy_floor),
        _bound(
            "accuracy of the worst digit",
            recalls[worst] if len(recalls) == CLASSES else None,
            policy.worst_class_floor,
            detail=f" ({worst})",
            absent=f"only {len(recalls)} of {CLASSES} digits have test images",
        ),
        _bound(
            "accuracy under the worst digit frequencies",
            scored.shifted_prior_accuracy,
            policy.shifted_prior_floor,
        ),
        _bound(
            "calibration error", scored.calibration_error, policy.calibration_ceiling, most=True
        ),
        _bound(
            "mean confidence of wrong answers",
            0.0 if never_wrong else scored.error_confidence,
            policy.error_confidence_ceiling,
            most=True,
        ),
        _bound("latency of one image, ms", scored.latency_ms, policy.latency_ceiling_ms, most=True),
        _bound("size, bytes", scored.size_bytes, policy.size_ceiling_bytes, most=True),
    ]
    for name, floor in policy.factor_floors.items():
        right = scored.factors.get(name)
        accuracy = float(right.mean()) if right is not None and len(right) else None
        checks.append(_bound(f"accuracy under {name}", accuracy, floor))
    return checks


def _bound(
    name: str,
    observed: float | None,
    threshold: float,
    *,
    most: bool = False,
    detail: str = "",
    absent: str = "it was not measured",
) -> Check:
    """Check `observed` against a floor, or against a ceiling if `most`; NaN and None fail."""
    side = "ceiling" if most else "floor"
    if observed is None:
        passed = False
        sentence = f"{name}: {absent}, so the {side} {threshold:.6g} is not met"
    else:
        passed = observed <= threshold if most else observed >= threshold
        verb = "keeps" if passed else "breaks"
        sentence = f"{name}{detail}: {observed:.6g} {verb} the {side} {threshold:.6g}"
    return Check(
        name=name,
        kind="floor",
        observed=observed,
        threshold=threshold,
        passed=passed,
        sentence=sentence,
    )


def _compare(
    candidate: Scored, champion: Scored, policy: PromotionPolicy, level: float
) -> tuple[list[Comparison], list[Check]]:
    """Return a comparison of each place, and a failed check for each condition without one."""
    places = [("overall", candidate.right, champion.right, policy.overall_margin)]
    for digit in range(CLASSES):
        shown = candidate.labels == digit
        if shown.any():
            ours = candidate.right[shown]
            theirs = champion.right[shown]
            places.append((f"digit {digit}", ours, theirs, policy.class_margin))
    missing = []
    for name in policy.factor_floors:
        if name in candidate.factors and name in champion.factors:
            ours = candidate.factors[name]
            theirs = champion.factors[name]
            places.append((name, ours, theirs, policy.factor_margin))
        else:
            who = "candidate" if name not in candidate.factors else "champion"
            missing.append(
                Check(
                    name=f"no worse: {name}",
                    kind="evidence",
                    observed=None,
                    threshold=-policy.factor_margin,
                    passed=False,
                    sentence=f"no worse: {name}: it was not measured for the {who}",
                )
            )
    return [_comparison(*place, level) for place in places], missing


def _comparison(
    place: str, ours: Outcomes, theirs: Outcomes, margin: float, level: float
) -> Comparison:
    try:
        paired = pair(ours, theirs)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    return Comparison(
        place=place,
        images=paired.images,
        gains=paired.gains,
        losses=paired.losses,
        difference=paired.difference,
        low=lower_limit(paired, level),
        high=upper_limit(paired, level),
        margin=margin,
    )


def _against(
    candidate: Scored,
    champion: Scored,
    comparisons: list[Comparison],
    alpha: float,
    level: float,
) -> list[Check]:
    """Return every check that needs a champion; `comparisons` begins with the overall one."""
    overall = comparisons[0]
    return [
        _gain(overall),
        _superiority(overall, level),
        _newer(candidate, champion),
        _as_accurate(overall),
        _no_worse_alone(overall, alpha),
        *[_loss(comparison) for comparison in comparisons],
        *[_no_worse(comparison, level) for comparison in comparisons],
    ]


def _gain(overall: Comparison) -> Check:
    seen = overall.difference > 0
    return Check(
        name=_GAIN,
        kind="benefit",
        observed=overall.difference,
        threshold=0,
        passed=seen,
        sentence=f"overall the candidate alone is right on {overall.gains} images, the champion "
        f"alone on {overall.losses}: {'a gain' if seen else 'no gain'} is seen",
    )


def _superiority(overall: Comparison, level: float) -> Check:
    p = p_not_better(Paired(overall.images, overall.gains, overall.losses))
    verb = "is" if p <= level else "is not"
    return Check(
        name=_SUPERIOR,
        kind="benefit",
        observed=p,
        threshold=level,
        passed=p <= level,
        sentence=f"overall the candidate {verb} proved better: exact McNemar p = {p:.2g} against "
        f"the level {level:.2g}",
    )


def _newer(candidate: Scored, champion: Scored) -> Check:
    ours = candidate.data_until
    theirs = champion.data_until
    # None is the base data set alone, which is older than any batch.
    newer = ours is not None and (theirs is None or ours > theirs)
    if not ours and not theirs:
        sentence = "both were trained on the base data set alone"
    else:
        verb = "was" if newer else "was not"
        there, here = (f"until {at}" if at else "without any batch" for at in (theirs, ours))
        sentence = f"the champion {verb} trained on older data: {there}, candidate {here}"
    return Check(
        name=_NEWER,
        kind="benefit",
        observed=float(newer),
        threshold=1,
        passed=newer,
        sentence=sentence,
    )


def _as_accurate(overall: Comparison) -> Check:
    passed = overall.difference >= 0
    return Check(
        name="at least as accurate overall",
        kind="offer",
        observed=overall.difference,
        threshold=0,
        passed=passed,
        sentence=f"overall the candidate is right on {overall.gains - overall.losses:+d} images: "
        f"it is {'at least as' if passed else 'less'} accurate",
    )


def _no_worse_alone(overall: Comparison, alpha: float) -> Check:
    # At the full alpha, without the correction for reuse: an offer is not yet a promotion.
    low = lower_limit(Paired(overall.images, overall.gains, overall.losses), alpha)
    passed = low > -overall.margin
    return Check(
        name="no worse overall, by this decision alone",
        kind="offer",
        observed=low,
        threshold=-overall.margin,
        passed=passed,
        sentence=f"overall, were this the only decision on these images, the difference would be "
        f"at least {low:+.4f} at level {alpha:.2g}; {'above' if passed else 'not above'} the "
        f"margin {-overall.margin:+.4f}",
    )


def _loss(comparison: Comparison) -> Check:
    passed = comparison.difference >= -comparison.margin
    verb = "is within" if passed else "is worse than"
    return Check(
        name=f"loss seen: {comparison.place}",
        kind="loss",
        observed=comparison.difference,
        threshold=-comparison.margin,
        passed=passed,
        sentence=f"{comparison.place}: the difference {comparison.difference:+.4f} {verb} the "
        f"margin {-comparison.margin:+.4f}",
    )


def _no_worse(comparison: Comparison, level: float) -> Check:
    passed = comparison.low > -comparison.margin
    sentence = (
        f"{comparison.place}: the difference is at least {comparison.low:+.4f} at level "
        f"{level:.2g}; {'above' if passed else 'not above'} the margin {-comparison.margin:+.4f}"
    )
    needed = images_to_prove(comparison.margin, level)
    if comparison.images < needed:
        sentence += (
            f"; {comparison.images} images cannot prove it even without one loss: bring {needed}"
        )
    return Check(
        name=f"no worse: {comparison.place}",
        kind="evidence",
        observed=comparison.low,
        threshold=-comparison.margin,
        passed=passed,
        sentence=sentence,
    )


def _conclude(checks: list[Check], champion: Scored | None) -> tuple[Verdict, str]:
    """Return the verdict and its reason, by the four steps of the README in their order."""
    broken = [check for check in checks if not check.passed]
    # Steps 1 and 2: without a policy, below a floor, or with a loss seen, nothing is promoted.
    barred = [check.sentence for check in broken if check.kind in {"policy", "floor", "loss"}]
    if barred:
        return "keep", "; ".join(barred)
    if not champion:
        return "promote", "there is no champion yet, and the candidate keeps every floor"
    named = {check.name: check for check in checks}
    seen = named[_GAIN]
    superior = named[_SUPERIOR]
    newer = named[_NEWER]
    unproved = [check.sentence for check in broken if check.kind == "evidence"]
    no_offer = [check.sentence for check in broken if check.kind == "offer"]
    verdict: Verdict = "needs-approval"
    # Without a gain or newer data there is no case for a change, so not even an offer.
    if not seen.passed and not newer.passed:
        verdict = "keep"
        reason = f"nothing speaks for a change: {seen.sentence}; {newer.sentence}"
    # Step 3: superior overall, or newer; and no worse anywhere.
    elif superior.passed and not unproved:
        verdict = "promote"
        reason = f"{superior.sentence}; and it is proved to be no worse in any digit or condition"
    elif newer.passed and not unproved:
        verdict = "promote"
        reason = f"proved to be no worse anywhere, and {newer.sentence}"
    # Step 4: a borderline case is offered to a person, the rest is kept.
    elif no_offer:
        verdict = "keep"
        reason = "too little speaks for a change: " + "; ".join(no_offer)
    elif unproved:
        reason = "not proved to be no worse: " + "; ".join(unproved)
    else:
        reason = f"proved to be no worse anywhere, but {superior.sentence}"
    return verdict, reason
