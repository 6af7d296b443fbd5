"""Promotion: from two models' outcomes to a verdict with reasons; see README.md."""

from mnist_cnn.promotion.decision import (
    Check,
    Decision,
    ReuseHistory,
    Scored,
    Verdict,
    decide,
)
from mnist_cnn.promotion.policy import PromotionPolicy

__all__ = [
    "Check",
    "Decision",
    "PromotionPolicy",
    "ReuseHistory",
    "Scored",
    "Verdict",
    "decide",
]
