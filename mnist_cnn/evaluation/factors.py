"""The factors of the model card: handwriting, noise, image quality and the split's distribution."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from mnist_cnn.digits import CLASSES
from mnist_cnn.evaluation.corruptions import Corruption, condition
from mnist_cnn.evaluation.figures import (
    ConditionResult,
    PriorResult,
    PriorShift,
    Shift,
    Slice,
)
from mnist_cnn.evaluation.intervals import wilson
from mnist_cnn.styles import STYLES, Floats

PARTS = 5
"""Equally large slices that each natural style is cut into."""

RADIUS = 0.2
"""Total variation distance within which the worst label priors are searched."""


def score_conditions(
    corruptions: tuple[Corruption, ...],
    predictions: Mapping[str, NDArray[np.uint8]],
    gaps: Mapping[str, str],
    labels: NDArray[np.int64],
) -> list[ConditionResult]:
    """Return the accuracy under each corruption at each strength, in order.

    `predictions` holds the predicted digits, uint8 (N,), of each condition, `gaps` the reason for
    each that failed. A condition that is in neither is a gap too.
    """
    results = []
    for corruption in corruptions:
        for strength in corruption.strengths:
            name = condition(corruption, strength)
            right = int((predictions[name] == labels).sum()) if name in predictions else None
            results.append(
                ConditionResult(
                    corruption=corruption.name,
                    factor=corruption.factor,
                    unit=corruption.unit,
                    strength=strength,
                    accuracy=None if right is None else right / len(labels),
                    interval=None if right is None else wilson(right, len(labels)),
                    gap=gaps.get(name, "not measured") if right is None else None,
                )
            )
    return results


def slice_by_style(styles: Mapping[str, Floats], right: NDArray[np.bool_]) -> list[Slice]:
    """Cut each style into `PARTS` equally large slices and return the accuracy of each.

    `right`, bool (N,), marks the images that are classified correctly; `styles` holds float64 (N,)
    for each style. Images without a style (blank ones) are in no slice. Equal values stay together,
    so a slice may be empty; it is left out.
    """
    slices = []
    for style, values in styles.items():
        known = np.isfinite(values)
        if not known.any():
            continue
        edges = np.quantile(values[known], np.linspace(0, 1, PARTS + 1))  # (6,)
        # Only the inner edges cut, so the least and the greatest value have a slice. NaN sorts
        # behind every edge; `known` keeps it out of the last slice.
        part_of = np.searchsorted(edges[1:-1], values, "right")  # (N,), 0 to 4
        for part in range(PARTS):
            inside = known & (part_of == part)
            images = int(inside.sum())
            if images:
                hits = int(right[inside].sum())
                slices.append(
                    Slice(
                        style=style,
                        unit=STYLES[style],
                        low=float(edges[part]),
                        high=float(edges[part + 1]),
                        images=images,
                        accuracy=hits / images,
                        interval=wilson(hits, images),
                    )
                )
    return slices


def reweight(confusion: NDArray[np.int64], shift: Shift | None) -> PriorShift:
    """Return accuracy under other label priors; `confusion` is true digit by predicted digit.

    Source of the reweighting: Saerens et al. 2002, doi:10.1162/089976602753284446. The worst case
    is exact: with recalls fixed, accuracy is linear in the priors, so the worst ones move as much
    weight as the radius allows from the digits of best recall to the digit of least recall.
    """
    support = confusion.sum(1)  # (10,)
    # The recall of a digit without test images is NaN.
    recall = np.divide(
        confusion.diagonal(), support, out=np.full(CLASSES, np.nan), where=support > 0
    )
    priors = support / support.sum()
    # Benford's law has no leading 0.
    first_digit = np.log10(1 + 1 / np.arange(1, CLASSES))
    scenarios = {
        "uniform": np.full(CLASSES, 1 / CLASSES),
        "leading digits of real-life numbers (Benford 1938)": np.concatenate([[0], first_digit]),
    }
    if shift:
        counts = np.array(shift.training_labels)
        scenarios["as in the training split"] = counts / counts.sum()
    return PriorShift(
        scenarios=[_under(name, shares, recall) for name, shares in scenarios.items()],
        radius=RADIUS,
        worst=_under("worst within the radius", _worst_priors(priors, recall), recall),
    )


def _under(name: str, priors: Floats, recall: Floats) -> PriorResult:
    # A digit without a recall does no harm if it has no weight; otherwise the accuracy is a gap.
    unknown = [digit for digit in range(CLASSES) if priors[digit] > 0 and np.isnan(recall[digit])]
    return PriorResult(
        name=name,
        priors=priors.tolist(),
        accuracy=None if unknown else float(priors @ np.nan_to_num(recall)),
        gap=f"no test image shows {', '.join(map(str, unknown))}" if unknown else None,
    )


def _worst_priors(priors: Floats, recall: Floats) -> Floats:
    # Moving weight w from one digit to another changes the total variation distance by w. So take
    # the radius greedily from the digits of best recall, and give it to the digit of least recall.
    worst = priors.copy()
    best_first = np.argsort(-np.nan_to_num(recall, nan=-1), kind="stable")
    shown = [digit for digit in best_first if priors[digit] > 0]
    left = RADIUS
    for digit in shown[:-1]:
        moved = min(left, priors[digit])
        worst[digit] -= moved
        left -= moved
    worst[shown[-1]] += RADIUS - left
    return worst
