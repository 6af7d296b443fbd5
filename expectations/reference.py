"""How accepted images are distributed, and how far arriving ones have moved from that."""

from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, model_validator

from expectations.image_table import CLASSES

if TYPE_CHECKING:
    import pandas as pd

FEATURES = ("label", "ink", "stroke_width", "slant", "mean", "contrast")
"""The columns of the image table whose distribution is compared."""

_BINS = 10


class FeatureProfile(BaseModel, frozen=True, extra="forbid"):
    """One feature's histogram: `counts` has one number more than there are inner `edges`."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if len(self.counts) != len(self.edges) + 1 or list(self.edges) != sorted(self.edges):
            raise ValueError(
                f"a profile has {len(self.edges)} edges and {len(self.counts)} counts; "
                "expected ascending edges and one count more"
            )
        return self


class ReferenceProfile(BaseModel, frozen=True, extra="forbid"):
    """The histograms of accepted images, by feature."""

    features: dict[str, FeatureProfile]

    def extended(self, table: "pd.DataFrame") -> "ReferenceProfile":
        """Return the profile with the images of a table counted in as well, in the same bins."""
        return ReferenceProfile(
            features={
                feature: FeatureProfile(
                    edges=p.edges,
                    counts=tuple(
                        (
                            np.array(p.counts)
                            + _counts(table[feature].to_numpy(), np.array(p.edges))
                        ).tolist()
                    ),
                )
                for feature, p in self.features.items()
            }
        )


def reference_profile(table: "pd.DataFrame") -> ReferenceProfile:
    """Return the profile of an image table: a bin for each digit, and tenths of every feature.

    Raises ValueError for a table without rows.
    """
    if not len(table):
        raise ValueError("there are no images to make a reference profile of; expected at least 1")
    profiles = {}
    for feature in FEATURES:
        values = table[feature].to_numpy()
        if feature == "label":
            edges = np.arange(1, CLASSES) - 0.5
        else:
            # Tied values can make tenths coincide; equal edges would leave a bin always empty.
            edges = np.unique(np.quantile(values, np.arange(1, _BINS) / _BINS))
        profiles[feature] = FeatureProfile(
            edges=tuple(edges.tolist()), counts=tuple(_counts(values, edges).tolist())
        )
    return ReferenceProfile(features=profiles)


def drift_table(table: "pd.DataFrame", reference: ReferenceProfile) -> "pd.DataFrame":
    """Return one row with `psi_FEATURE`: the population stability index against `reference`.

    The sum over bins of (p - q) ln(p / q); 0.1 is commonly taken for a shift worth a look and 0.25
    for another population (N. Siddiqi, Credit Risk Scorecards, 2006). Half an image is added to
    each bin, so that an empty one does not make it infinite.
    """
    import pandas as pd  # noqa: PLC0415 - a quarter of a second that readers of profiles do not pay

    indices = {}
    for feature, profile in reference.features.items():
        arrived = _shares(_counts(table[feature].to_numpy(), np.array(profile.edges)))
        accepted = _shares(np.array(profile.counts))
        index = float(((arrived - accepted) * np.log(arrived / accepted)).sum())
        indices[f"psi_{feature}"] = [index]
    return pd.DataFrame(indices)


def _counts(values: NDArray[Any], edges: NDArray[Any]) -> NDArray[np.int64]:
    return np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1)


def _shares(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    smoothed = counts + 0.5
    return np.asarray(smoothed / smoothed.sum())
