"""Promotion policies: the floors and margins that a candidate has to keep.

The README of this room has the measurements behind the defaults.
"""

from typing import Annotated

from pydantic import BaseModel, Field

FACTOR_FLOORS = {
    "slant=-15": 0.95,
    "slant=15": 0.95,
    "rotation=-15": 0.95,
    "rotation=15": 0.95,
    "scale=0.7": 0.9,
    "scale=1.2": 0.95,
    "thin stroke=0.25": 0.95,
    "thick stroke=0.5": 0.95,
    "elastic style=1": 0.95,
    "Gaussian noise=0.08": 0.95,
    "impulse noise=0.03": 0.95,
    "shot noise=60": 0.95,
    "blur=1": 0.9,
    "occlusion=4": 0.94,
}
"""Least accuracy under each mild condition, which a digit on a form may well meet. Harsher ones are
measured and shown, but do not decide: there, models of one recipe differ by many points with
nothing but their seed, and a floor would pick seeds."""


class PromotionPolicy(BaseModel, frozen=True, extra="forbid"):
    """Requirements of a candidate. The defaults are production's.

    They were chosen on held-out images of MNIST's training split, with models of the production
    recipe that differ in nothing but their seed; the test split was not used.
    """

    alpha: float = Field(
        0.05,
        gt=0,
        le=0.2,
        description="Chance that a test split ever lets a worse model through unseen, over all of "
        "its decisions: the first has half of it, the k-th alpha / (k (k + 1)). Also the chance "
        "that a model worse by the margin is offered for approval, in one decision.",
    )
    accuracy_floor: float = Field(
        0.98,
        gt=0,
        lt=1,
        description="Least test accuracy.",
    )
    worst_class_floor: float = Field(
        0.96,
        gt=0,
        lt=1,
        description="Least share of any one digit's images that is classified correctly.",
    )
    shifted_prior_floor: float = Field(
        0.975,
        gt=0,
        lt=1,
        description="Least accuracy under the worst frequencies of the digits within a total "
        "variation distance of 0.2 from the test split's.",
    )
    factor_floors: dict[str, Annotated[float, Field(gt=0, lt=1)]] = Field(
        default_factory=lambda: dict(FACTOR_FLOORS),
        description="Least accuracy under each condition that the model is meant for. A condition "
        "that is named here and not measured is a failure; one that is not named does not count. "
        "Without any the policy is empty and promotes nothing.",
    )
    calibration_ceiling: float = Field(
        0.15,
        gt=0,
        lt=1,
        description="Most expected calibration error. Label smoothing, which makes a model "
        "under-confident, counts towards it.",
    )
    error_confidence_ceiling: float = Field(
        0.8,
        gt=0,
        lt=1,
        description="Most mean confidence of the wrong answers. When few answers are wrong, "
        "over-confidence hardly shows in the calibration error, but it does here.",
    )
    latency_ceiling_ms: float = Field(
        10,
        gt=0,
        description="Most time of one image, milliseconds.",
    )
    size_ceiling_bytes: int = Field(
        1_000_000, gt=0, description="Most size of the stored model, bytes."
    )
    overall_margin: float = Field(
        0.001,
        gt=0,
        lt=1,
        description="Most accuracy that may be lost overall: the smallest loss that a team would "
        "call one. With a wider margin more models are proved to be no worse, but a model that is "
        "worse by less than the margin can be promoted.",
    )
    class_margin: float = Field(
        0.02,
        gt=0,
        lt=1,
        description="Most accuracy that may be lost in one digit. The floor of the worst digit "
        "bounds the total.",
    )
    factor_margin: float = Field(
        0.02,
        gt=0,
        lt=1,
        description="Most accuracy that may be lost in one named condition. A margin close to the "
        "difference between two seeds of one recipe would pick seeds.",
    )
