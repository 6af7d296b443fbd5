"""Pictures of an evaluation, as PNG bytes, readable on light and on dark pages."""

import io
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mnist_cnn.digits import CLASSES, SIDE, Digits
from mnist_cnn.evaluation.calibration import BINS
from mnist_cnn.evaluation.corruptions import BATCH, CORRUPTIONS, corrupted
from mnist_cnn.evaluation.figures import Evaluation, Interval
from mnist_cnn.evaluation.outcomes import Outcomes
from mnist_cnn.evaluation.saliency import map_saliency
from mnist_cnn.styles import STYLES, Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PAPER = "#fcfcfa"
_TEXT = "#1c2430"
_FAINT = "#5b6675"
_LINES = "#dfe3e8"
_CANDIDATE = "#1d5fd1"
_CHAMPION = "#d9700a"

_FEW = 10
"""Least number of images for an accuracy to be drawn; that of fewer is too uncertain."""

_PITCH = 1.22
"""Height of a row of small images with its caption, in widths of a column."""
_GAP = 0.03
"""Margin around each small image, in widths of a column."""

_EXAMPLE = 5
"""Digit that shows the corruptions: a five has curves and corners."""

# An opaque sheet with dark text reads the same on a light and on a dark page.
_STYLE: Any = {
    "figure.facecolor": _PAPER,
    "savefig.facecolor": _PAPER,
    "axes.facecolor": _PAPER,
    "axes.edgecolor": _FAINT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "grid.color": _LINES,
    "grid.linewidth": 0.8,
    "font.size": 9,
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.titlecolor": _TEXT,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "legend.frameon": False,
}


@contextmanager
def _sheet(width: float, height: float) -> Iterator[tuple["Figure", io.BytesIO]]:
    """Yield an empty figure in the common style, and the buffer that holds its PNG afterwards."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    png = io.BytesIO()
    with mpl.rc_context(_STYLE):
        # Without pyplot, which keeps every figure in a global list until it is closed.
        figure = Figure((width, height), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure, png
        figure.savefig(png, metadata={"Software": None})


def _heading(figure: "Figure", title: str, subtitle: str) -> None:
    width, height = figure.get_size_inches()
    # Positions are shares of the figure; these are 0.15 and 0.12 inches on any size.
    left = 0.15 / width
    top = 0.12 / height
    figure.text(left, 1 - top, title, va="top", fontsize=13, fontweight="bold")
    figure.text(left, 1 - 3.2 * top, subtitle, va="top", fontsize=9, color=_FAINT)
    # The layout does not know about `figure.text`, so the panels must leave room for it.
    layout: Any = figure.get_layout_engine()
    layout.set(rect=(0, 0, 1, 1 - 5.4 * top))


def plot_confusion(evaluation: Evaluation) -> bytes:
    """Draw the confusion matrix with a pale diagonal, so that the errors stand out."""
    confusion = np.array(evaluation.confusion)  # (10, 10)
    errors = np.ma.masked_array(confusion, np.eye(CLASSES, dtype=bool) | (confusion == 0))
    highest = max(1, int(errors.max()) if errors.count() else 1)
    with _sheet(9.6, 6.8) as (figure, png):
        _heading(
            figure,
            "Which digit is taken for which",
            f"Number of test images, {evaluation.images:,} in all, of which "
            f"{evaluation.confidence.errors:,} are misread. Red: errors; grey: right answers.",
        )
        axes = figure.subplots()
        # A lower limit below 0 gives a single error a colour that differs from white.
        axes.imshow(errors, cmap="Reds", vmin=-highest * 0.25, vmax=highest * 1.1)
        for true in range(CLASSES):
            for predicted in range(CLASSES):
                count = int(confusion[true, predicted])
                right = true == predicted
                if right:
                    axes.add_patch(_cell(predicted, true))
                axes.text(
                    predicted,
                    true,
                    f"{count:,}" if count or right else "·",
                    ha="center",
                    va="center",
                    color="white"
                    if not right and count > highest * 0.6
                    else _TEXT
                    if count
                    else "#b6bec8",
                    fontweight="normal" if right or not count else "bold",
                )
        axes.set(
            xlabel="predicted digit",
            ylabel="true digit",
            xticks=range(CLASSES),
            yticks=range(CLASSES),
        )
        axes.grid(visible=False)
        axes.tick_params(length=0)
    return png.getvalue()


def _cell(column: int, row: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.5, row - 0.5), 1, 1, color="#e6e9ed", linewidth=0)


def _named(
    candidate: Evaluation, champion: Evaluation | None
) -> list[tuple[str, str, str, Evaluation]]:
    """Return name, colour, marker and evaluation of the models to compare, the champion first."""
    last = ("candidate", _CANDIDATE, "o", candidate)
    # Later lines cover earlier ones, so the candidate is drawn last.
    return [("champion", _CHAMPION, "s", champion), last] if champion else [last]


def plot_factors(candidate: Evaluation, champion: Evaluation | None = None) -> bytes:
    """Draw accuracy against strength for every corruption, for candidate and champion."""
    kinds = list(dict.fromkeys(result.corruption for result in candidate.conditions))
    columns = 4
    rows = -(-(len(kinds) + 1) // columns)  # rounded up; one panel more holds the legend
    with _sheet(11.2, 2.6 * rows + 0.9) as (figure, png):
        _heading(
            figure,
            "Accuracy under corrupted images",
            f"Percent of {candidate.images:,} test images that are read rightly; bars: 95 % "
            "intervals (Wilson); dashed: clean images. The scales of the panels differ.",
        )
        panels = figure.subplots(rows, columns).flat
        for kind in kinds:
            axes = next(panels)
            results = [result for result in candidate.conditions if result.corruption == kind]
            # The axis is ordinal: strengths are evenly spaced, whatever their values.
            positions = {result.strength: position for position, result in enumerate(results)}
            for name, colour, marker, evaluation in _named(candidate, champion):
                _draw_points(axes, evaluation, kind, positions, (name, colour, marker))
                axes.axhline(evaluation.accuracy * 100, color=colour, dashes=(3, 3), linewidth=0.9)
            axes.set_title(kind)
            axes.set_xticks(range(len(positions)), [f"{strength:g}" for strength in positions])
            axes.set_xlabel(results[0].unit, fontsize=8)
            axes.margins(x=0.15, y=0.12)
            axes.yaxis.set_major_formatter("{x:g} %")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        for number, axes in enumerate(panels):
            axes.axis("off")
            if number == 0:
                axes.legend(handles, labels, loc="center", fontsize=11)
    return png.getvalue()


def _draw_points(
    axes: "Axes",
    evaluation: Evaluation,
    corruption: str,
    positions: dict[float, int],
    look: tuple[str, str, str],
) -> None:
    """Draw the measured conditions of one corruption; a gap stays empty."""
    known = [
        (positions[result.strength], result.accuracy, result.interval)
        for result in evaluation.conditions
        if result.corruption == corruption
        and result.strength in positions
        and result.accuracy is not None
        and result.interval is not None
    ]
    _draw_intervals(
        axes,
        [position for position, _, _ in known],
        [accuracy for _, accuracy, _ in known],
        [interval for _, _, interval in known],
        look,
    )


def _draw_intervals(
    axes: "Axes",
    positions: Sequence[float],
    shares: list[float],
    intervals: list[Interval],
    look: tuple[str, str, str],
) -> None:
    name, colour, marker = look
    middle = np.array(shares) * 100
    low = np.array([interval.low for interval in intervals]) * 100
    high = np.array([interval.high for interval in intervals]) * 100
    axes.errorbar(
        positions,
        middle,
        # An accuracy of 1 rounds to a hair above the end of its own interval.
        np.maximum(np.stack([middle - low, high - middle]), 0),
        label=name,
        color=colour,
        marker=marker,
        markersize=4.5,
        linewidth=1.6,
        elinewidth=1,
        capsize=2,
    )


def plot_slices(candidate: Evaluation, champion: Evaluation | None = None) -> bytes:
    """Draw accuracy against each natural style that the test images show."""
    with _sheet(11.2, 3.9) as (figure, png):
        _heading(
            figure,
            "Accuracy by natural handwriting style",
            "Percent of the test images of each fifth of the measured range that are read rightly; "
            "bars: 95 % intervals (Wilson).",
        )
        panels = figure.subplots(1, len(STYLES), sharey=True)
        for axes, (style, unit) in zip(panels, STYLES.items(), strict=True):
            for name, colour, marker, evaluation in _named(candidate, champion):
                parts = [part for part in evaluation.slices if part.style == style]
                _draw_intervals(
                    axes,
                    range(len(parts)),
                    [part.accuracy for part in parts],
                    [part.interval for part in parts],
                    (name, colour, marker),
                )
                axes.set_xticks(
                    range(len(parts)),
                    [f"{part.low:.3g}\nto {part.high:.3g}" for part in parts],
                    fontsize=8,
                )
            axes.set_title(style)
            axes.set_xlabel(unit, fontsize=8)
            axes.margins(x=0.12)
            axes.yaxis.set_major_formatter("{x:g} %")
        panels[0].legend(loc="lower center")
    return png.getvalue()


def plot_reliability(candidate: Evaluation, champion: Evaluation | None = None) -> bytes:
    """Draw accuracy against confidence above the number of images at each confidence."""
    with _sheet(9.6, 6.4) as (figure, png):
        _heading(
            figure,
            "Is a confidence of 90 % right 90 % of the time?",
            "Below the diagonal the model is too sure of itself, above it not sure enough.\n"
            f"Confidences that fewer than {_FEW} images have are left out of the curve.",
        )
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        above.plot([0, 100], [0, 100], color=_FAINT, dashes=(3, 3), linewidth=1)
        models = _named(candidate, champion)
        for position, (name, colour, marker, evaluation) in enumerate(models):
            found = [part for part in evaluation.calibration.bins if part.images >= _FEW]
            drawn = [part for part in evaluation.calibration.bins if part.images]
            error = evaluation.calibration.expected_error
            above.plot(
                [(part.confidence or 0) * 100 for part in found],
                [(part.accuracy or 0) * 100 for part in found],
                color=colour,
                marker=marker,
                linewidth=1.6,
                label=f"{name}: expected calibration error {error * 100:.2f} points",
            )
            # The models' bars share the width of a bin, with half a bar of space between bins.
            width = 100 / BINS / (len(models) + 0.5)
            below.bar(
                [part.low * 100 + width * (position + 0.75) for part in drawn],
                [part.images for part in drawn],
                width,
                color=colour,
            )
        above.set(ylabel="accuracy, %", xlim=(0, 100), ylim=(0, 102))
        above.legend(loc="lower right")
        below.set(xlabel="confidence, %", ylabel="images", yscale="log")
    return png.getvalue()


class _ImageGrid:
    """Small images in a grid on one pair of axes; a pair for each image takes five times as long.

    Coordinates are in widths of a column, from the top left corner.
    """

    def __init__(self, figure: Any, rows: int, columns: int, *, left: float = 0.0) -> None:
        """Leave `left` columns free for the labels of the rows."""
        self._axes: Axes = figure.add_subplot()
        self._axes.set(xlim=(-left, columns), ylim=(rows * _PITCH, 0), aspect="equal")
        self._axes.set_autoscale_on(False)
        self._axes.axis("off")

    def show(self, row: int, column: int, image: NDArray[Any], caption: str, size: float) -> None:
        """Draw a grey image, (28, 28), 0 to 255, with a caption above it."""
        self._draw(row, column, image, cmap="gray", vmin=0, vmax=255)
        self._axes.text(
            column + 0.5, (row + 1) * _PITCH - 1, caption, ha="center", va="bottom", fontsize=size
        )

    def overlay(self, row: int, column: int, saliency: Floats) -> None:
        """Tint an image red where `saliency`, (28, 28), is positive; its maximum is the deepest."""
        red = np.zeros((SIDE, SIDE, 4))  # red, green, blue, opacity
        red[..., 0] = 1.0
        red[..., 1] = 0.25
        red[..., 3] = np.clip(saliency / max(float(saliency.max()), 1e-12), 0, 1) * 0.85
        self._draw(row, column, red, interpolation="bilinear")

    def label_row(self, row: int, label: str, below: str = "") -> None:
        """Label a row at its left, with a smaller line below."""
        middle = (row + 1) * _PITCH - 0.5
        side: Any = {"ha": "right", "x": -0.1}
        self._axes.text(
            y=middle, s=label, va="bottom" if below else "center", fontweight="bold", **side
        )
        self._axes.text(y=middle, s=below, va="top", fontsize=7, color=_FAINT, **side)

    def _draw(self, row: int, column: int, image: NDArray[Any], **style: Any) -> None:
        bottom = (row + 1) * _PITCH
        extent = (column + _GAP, column + 1 - _GAP, bottom - _GAP, bottom - 1 + _GAP)
        self._axes.imshow(image, extent=extent, aspect="equal", **style)


def plot_errors(outcomes: Outcomes, digits: Digits, most: int = 32) -> bytes:
    """Draw the errors of highest confidence, with true and predicted digit."""
    predicted = outcomes.probabilities.argmax(1)  # (N,)
    confidence = outcomes.probabilities.max(1)  # (N,)
    wrong = np.flatnonzero(predicted != digits.labels)
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:most]
    columns = 8
    rows = max(1, -(-len(worst) // columns))
    with _sheet(9.6, 1.4 * rows + 0.7) as (figure, png):
        _heading(
            figure,
            f"The {len(worst)} surest of {len(wrong)} errors",
            "True digit → predicted digit, with the confidence in the wrong one.",
        )
        grid = _ImageGrid(figure, rows, columns)
        for position, image in enumerate(worst):
            caption = (
                f"{digits.labels[image]} → {predicted[image]}   {confidence[image] * 100:.0f} %"
            )
            grid.show(*divmod(position, columns), digits.images[image], caption, 9)
    return png.getvalue()


def plot_corruptions(digits: Digits, seed: int = 0) -> bytes:
    """Draw one image under every corruption at every strength."""
    example = int(np.argmax(digits.labels == _EXAMPLE))
    images = torch.tensor(digits.images[example : example + BATCH])
    columns = 1 + max(len(corruption.strengths) for corruption in CORRUPTIONS)
    rows = -(-len(CORRUPTIONS) // 2)
    with _sheet(11.8, 1.08 * rows + 0.7) as (figure, png):
        _heading(
            figure,
            "Every corruption at every strength",
            "One test image, clean and corrupted; the numbers are strengths in the unit given.",
        )
        halves: Any = figure.subfigures(1, 2, wspace=0.03)
        for half, corruptions in zip(halves, (CORRUPTIONS[:rows], CORRUPTIONS[rows:]), strict=True):
            half.set_facecolor(_PAPER)
            grid = _ImageGrid(half, rows, columns, left=1.7)
            for row, corruption in enumerate(corruptions):
                grid.label_row(row, corruption.name, textwrap.fill(corruption.unit, 22))
                grid.show(row, 0, digits.images[example], "clean", 8)
                for column, strength in enumerate(corruption.strengths, 1):
                    batch = next(corrupted(images, corruption, strength, seed))
                    grid.show(row, column, batch[0].numpy(), f"{strength:g}", 8)
    return png.getvalue()


def plot_examination(model: nn.Module, outcomes: Outcomes, digits: Digits) -> bytes:
    """Draw for each digit the images predicted as it, and a saliency map.

    Rows: the mean of these images, the one of highest confidence, the one of lowest, and that of
    highest confidence under its saliency map. A digit that is never predicted stays empty.
    """
    predicted = outcomes.probabilities.argmax(1)  # (N,)
    confidence = outcomes.probabilities.max(1)  # (N,)
    rows = ("mean of all\nread as it", "surest", "least sure", "where hiding\nhurts")
    with _sheet(11.5, 5.9) as (figure, png):
        _heading(
            figure,
            "What the model takes for each digit, and where it looks",
            "Last row: how far hiding a square of 5 px around a place lowers the probability of "
            "the surest image's answer (red: most).",
        )
        grid = _ImageGrid(figure, len(rows), CLASSES, left=1.0)
        for row, label in enumerate(rows):
            grid.label_row(row, label)
        for digit in range(CLASSES):
            read = np.flatnonzero(predicted == digit)  # indices of the images
            if not len(read):
                continue
            surest = digits.images[read[confidence[read].argmax()]]
            doubtful = read[confidence[read].argmin()]
            least = f"{confidence[doubtful] * 100:.0f} %, is a {digits.labels[doubtful]}"
            grid.show(0, digit, digits.images[read].mean(0), f"{digit}", 11)
            grid.show(1, digit, surest, f"{confidence[read].max() * 100:.1f} %", 8)
            grid.show(2, digit, digits.images[doubtful], least, 8)
            grid.show(3, digit, surest, "", 8)
            grid.overlay(3, digit, map_saliency(model, surest[None])[0])
    return png.getvalue()
