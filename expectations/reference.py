"""Reference profile: histograms of accepted images, and the drift of arriving ones from them."""

from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, model_validator

from mnist_cnn.digits import CLASSES
from mnist_cnn.record import Record

if TYPE_CHECKING:
    import pandas as pd

FEATURES = ("label", "ink", "stroke_width", "slant", "mean", "contrast")
"""The columns of the image table whose distribution is compared."""

# The common thresholds of a population stability index (N. Siddiqi, Credit Risk Scorecards, 2006).
WORTH_A_LOOK = 0.1
"""Population stability index above which a change is worth a look."""

ANOTHER_POPULATION = 0.25
"""Population stability index above which the images count as another population."""

_BINS = 10  # of every feature but the label, which has a bin for each digit


class FeatureProfile(BaseModel, frozen=True, extra="forbid"):
    """Histogram of one feature: ascending inner `edges`, and one count more than edges.

    The first and the last bin are open, so that every value has a bin.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    total: float
    """Sum of the feature over all images."""

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if len(self.counts) != len(self.edges) + 1 or list(self.edges) != sorted(self.edges):
            raise ValueError(
                f"a profile has {len(self.edges)} edges and {len(self.counts)} counts; "
                "expected ascending edges and one count more"
            )
        return self

    @property
    def mean(self) -> float:
        """The feature's mean over all images."""
        return self.total / sum(self.counts)


class ReferenceProfile(Record, extra="forbid"):
    """Histograms of accepted images by feature."""

    features: dict[str, FeatureProfile]

    @property
    def images(self) -> int:
        """The number of images; each has exactly one label."""
        return sum(self.features["label"].counts)

    def extended(self, table: "pd.DataFrame") -> "ReferenceProfile":
        """Return a profile that also counts the images of `table`, in the same bins.

        The edges stay those of the first images, so that the profiles of one data set can be
        compared with each other.
        """
        features = {}
        for feature, profile in self.features.items():
            values = table[feature].to_numpy()
            counts = np.array(profile.counts) + _counts(values, np.array(profile.edges))
            total = profile.total + float(values.sum())
            features[feature] = profile.model_copy(
                update={"counts": tuple(counts.tolist()), "total": total}
            )
        return ReferenceProfile(features=features)


class Change(BaseModel, frozen=True):
    """Change of one feature, or of one digit's share, between two profiles."""

    feature: str
    before: float
    """Mean; of a digit, its share of the images."""
    after: float
    stability_index: float | None
    """Population stability index; None for a single digit, whose index is in that of `label`."""


def compare_profiles(before: ReferenceProfile, after: ReferenceProfile) -> list[Change]:
    """Return the changes of image statistics and label mix, features first, then digits.

    Profiles of one data set have the same bins. Raises ValueError if the bins differ.
    """
    changes = []
    for feature, old in before.features.items():
        new = after.features[feature]
        if new.edges != old.edges:
            raise ValueError(
                f"the profiles have different bins of {feature}: they belong to different data "
                "sets; expected two snapshots of one"
            )
        index = _stability_index(np.array(new.counts), np.array(old.counts))
        changes.append(
            Change(feature=feature, before=old.mean, after=new.mean, stability_index=index)
        )
    digits = zip(before.features["label"].counts, after.features["label"].counts, strict=True)
    changes += [
        Change(
            feature=f"digit {digit}",
            before=old / before.images,
            after=new / after.images,
            stability_index=None,
        )
        for digit, (old, new) in enumerate(digits)
    ]
    return changes


def reference_profile(table: "pd.DataFrame") -> ReferenceProfile:
    """Return the profile of an image table: a bin for each digit, and deciles of every feature.

    Raises ValueError for a table without rows.
    """
    if not len(table):
        raise ValueError("there are no images to make a reference profile of; expected at least 1")
    profiles = {}
    for feature in FEATURES:
        values = table[feature].to_numpy()
        if feature == "label":
            edges = np.arange(1, CLASSES) - 0.5  # (9,): half-way between neighbouring digits
        else:
            # Tied values can make deciles coincide; equal edges would leave a bin always empty.
            edges = np.unique(np.quantile(values, np.arange(1, _BINS) / _BINS))  # at most (9,)
        profiles[feature] = FeatureProfile(
            edges=tuple(edges.tolist()),
            counts=tuple(_counts(values, edges).tolist()),
            total=float(values.sum()),
        )
    return ReferenceProfile(features=profiles)


def drift_table(table: "pd.DataFrame", reference: ReferenceProfile) -> "pd.DataFrame":
    """Return one row with `psi_FEATURE`: the population stability index against `reference`.

    The index is the sum over bins of (p - q) ln(p / q). Half an image is added to each bin, so that
    an empty one does not make the index infinite.
    """
    import pandas as pd

    indices = {}
    for feature, profile in reference.features.items():
        arrived = _counts(table[feature].to_numpy(), np.array(profile.edges))
        index = _stability_index(arrived, np.array(profile.counts))
        indices[f"psi_{feature}"] = [index]
    return pd.DataFrame(indices)


def _stability_index(arrived: NDArray[np.int64], accepted: NDArray[np.int64]) -> float:
    p = _shares(arrived)  # (bins,)
    q = _shares(accepted)  # (bins,)
    return float(((p - q) * np.log(p / q)).sum())


def _counts(values: NDArray[Any], edges: NDArray[Any]) -> NDArray[np.int64]:
    # A value equal to an edge belongs to the bin above it. `minlength` keeps empty last bins.
    return np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1)


def _shares(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    smoothed = counts + 0.5  # (bins,), never 0
    return np.asarray(smoothed / smoothed.sum())
