"""Decide whether a candidate replaces the champion: a pure function of two evaluations."""

from typing import Literal

from pydantic import BaseModel, Field

from mnist_cnn.evaluation import Evaluation

Verdict = Literal["promote", "keep"]


class PromotionPolicy(BaseModel, frozen=True, extra="forbid"):
    """What a candidate has to prove. The defaults are production's."""

    accuracy_floor: float = Field(
        0.98, ge=0, le=1, description="Test accuracy under which no model is ever promoted."
    )


class Check(BaseModel, frozen=True):
    """One question that a candidate was asked, and its answer."""

    name: str
    observed: float
    threshold: float
    passed: bool
    sentence: str


class Decision(BaseModel, frozen=True):
    """The verdict on a candidate, with every check that led to it."""

    verdict: Verdict
    reason: str
    checks: list[Check]
    candidate: str
    champion: str | None
    snapshot: str


def decide(candidate: Evaluation, champion: Evaluation | None, policy: PromotionPolicy) -> Decision:
    """Compare two evaluations of the same images under `policy`.

    Raises ValueError if the two were measured on different snapshots, because then their difference
    says nothing.
    """
    if champion and champion.snapshot != candidate.snapshot:
        raise ValueError(
            f"the candidate was measured on snapshot {candidate.snapshot}, the champion on "
            f"{champion.snapshot}; expected the same: evaluate both again on one snapshot"
        )
    checks = [_at_least("accuracy floor", candidate.accuracy, policy.accuracy_floor)]
    if champion:
        checks += [
            _above("accuracy against the champion", candidate.accuracy, champion.accuracy),
            _at_least("macro F1 against the champion", candidate.macro_f1, champion.macro_f1),
        ]
    failed = [check.sentence for check in checks if not check.passed]
    return Decision(
        verdict="keep" if failed else "promote",
        reason="; ".join(failed or [check.sentence for check in checks]),
        checks=checks,
        candidate=candidate.model,
        champion=champion.model if champion else None,
        snapshot=candidate.snapshot,
    )


def _at_least(name: str, observed: float, threshold: float) -> Check:
    passed = observed >= threshold
    verb = "is at least" if passed else "is below"
    return Check(
        name=name,
        observed=observed,
        threshold=threshold,
        passed=passed,
        sentence=f"{name}: {observed:.4f} {verb} {threshold:.4f}",
    )


def _above(name: str, observed: float, threshold: float) -> Check:
    """Demand a real gain: a tie keeps the champion."""
    passed = observed > threshold
    verb = "is above" if passed else "is not above"
    return Check(
        name=name,
        observed=observed,
        threshold=threshold,
        passed=passed,
        sentence=f"{name}: {observed:.4f} {verb} {threshold:.4f}",
    )
