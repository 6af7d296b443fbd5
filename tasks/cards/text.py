"""Facts, sentences and tables of the model card and the data card."""

import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import numpy as np
from pydantic import BaseModel

from mnist_cnn.evaluation import Evaluation
from mnist_cnn.evaluation.figures import SURE, ConditionResult

MODEL_TEMPLATE = Path(__file__).with_name("model_card.md")
DATA_TEMPLATE = Path(__file__).with_name("data_card.md")

PICTURES = (
    "confusion",
    "factors",
    "slices",
    "reliability",
    "errors",
    "corruptions",
    "examination",
)
"""Pictures of a model card; `Pictures` holds the address of each."""


class Fact(BaseModel, frozen=True, extra="forbid"):
    """A measured or recorded value of a card; a misspelt field name is refused."""


class Pictures(Fact):
    """Address of each picture for a reader of the card: relative, or http(s)."""

    confusion: str
    factors: str
    slices: str
    reliability: str
    errors: str
    corruptions: str
    examination: str


class TrainingFacts(Fact):
    """Training of this version."""

    settings: dict[str, str | int | float | bool | None]
    """`TrainingConfig.model_dump()`."""
    procedure: str
    """Optimizer, schedule, objective and augmentation in one or two sentences."""
    precision: str
    """Such as `fp32`."""
    device: str
    """torch device, such as `cpu`."""
    started: datetime
    seconds: float
    images: int
    """Images in the training split."""
    images_per_second: float
    """Over the whole training."""


class HardwareFacts(Fact):
    """The machine that trained and measured."""

    processor: str
    cores: int
    memory_gib: float
    accelerator: str | None = None


class EnergyFacts(Fact):
    """Energy and emissions of the training, from codecarbon's offline tracker."""

    kwh: float
    grams_co2e: float
    hours: float
    """Hours of training."""
    provider: str
    """Cloud provider, or `none (own machine)`."""
    region: str
    """Country or region whose carbon intensity the estimate uses."""
    tool: str
    """Name and version, such as `codecarbon 3.3.2`."""
    method: str
    """Source of the power: the machine's counters, or a constant."""


class DataPart(Fact):
    """One batch of the snapshot."""

    name: str
    split: str
    images: int
    source: str
    """Origin of the batch."""
    digest: str
    """sha256 of its content."""


class DriftFigure(Fact):
    """Drift of one feature from the base data set, with its verdict."""

    name: str
    value: float
    """Population stability index."""
    limit: float
    passed: bool


class DataFacts(Fact):
    """The snapshot that this version was trained and measured on."""

    name: str
    digest: str
    address: str
    created: datetime
    parent: str | None
    """Digest of the snapshot before it; None for the base data set."""
    parts: list[DataPart]
    training_labels: list[int]
    """Images of each digit, 0 to 9."""
    test_labels: list[int]
    validation_verdict: str
    validation_address: str
    expectations_met: int
    expectations: int
    drift: list[DriftFigure]
    licence: str
    hub_id: str
    """Data set on the Hugging Face Hub from which it derives."""
    writers: str
    """A sentence on the writers of the base data set."""


class CheckFact(Fact):
    """One check of the promotion decision."""

    name: str
    passed: bool
    sentence: str


class CardFacts(Fact):
    """Facts of the model card; its template has no other source for this version."""

    name: str
    """Registered name, such as `mnist-cnn`."""
    version: str
    model_uri: str
    champion_uri: str
    created: datetime
    developers: list[str]
    contact: str
    repository: str
    run_id: str
    run_url: str
    """MLflow run."""
    flow_run_url: str
    """Prefect flow run."""
    data_card: str
    """Address of the data card for a reader of the card."""
    evaluation: str
    """Address of the evaluation, which holds every figure, likewise."""
    pictures: Pictures
    architecture: str
    """`str(model)`."""
    training: TrainingFacts
    hardware: HardwareFacts
    software: dict[str, str]
    """Version of each library."""
    energy: EnergyFacts | None
    """None is a gap that the card states."""
    data: DataFacts
    candidate: Evaluation
    """This version."""
    champion: Evaluation | None
    """The champion at the time of the measurement, on the same images."""
    previous: Evaluation | None
    """The champion before that one."""
    verdict: str
    reason: str
    checks: list[CheckFact]


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table; a pipe in a cell is escaped."""
    lines = [header, ["---"] * len(header), *rows]
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def percent(share: float | None) -> str:
    """Return a share as percent, or `not measured`."""
    return "not measured" if share is None else f"{share * 100:.2f} %"


def _compared(facts: CardFacts) -> dict[str, Evaluation]:
    """Return the evaluations to compare by the name of their column, this version's first."""
    compared = {f"this version ({facts.version})": facts.candidate}
    for role, other in (("champion", facts.champion), ("previous", facts.previous)):
        if other:
            compared[f"{role} ({other.model.rpartition('/')[2]})"] = other
    return compared


def describe(facts: CardFacts) -> dict[str, str]:
    """Return the tables and generated sentences of the model card, by name in its template."""
    from mnist_cnn.evaluation.corruptions import CORRUPTIONS

    return {
        "verdict": _verdict(facts),
        "comparison": _comparison(facts),
        "classes": _classes(facts),
        "confused": _confused(facts.candidate),
        "styles": _conditions(facts, "handwriting style"),
        "noise": _conditions(facts, "noise level"),
        "quality": _conditions(facts, "image quality"),
        "slices": _slices(facts),
        "shift": _shift(facts.candidate),
        "priors": _priors(facts.candidate),
        "confidence": _confidence(facts.candidate),
        "costs": _costs(facts),
        "gaps": "\n".join(f"- {gap}" for gap in facts.candidate.gaps)
        or "Everything that this card promises was measured.",
        "summary": _summary(facts.candidate),
        "weakness": _weakness(facts.candidate),
        "risk": _risk(facts.candidate),
        "corruptions": table(
            ["corruption", "strengths", "unit"],
            [
                [c.name, ", ".join(f"{strength:g}" for strength in c.strengths), c.unit]
                for c in CORRUPTIONS
            ],
        ),
        "sources": _sources(),
        "environment": _environment(facts),
        "settings": table(
            ["setting", "value"],
            [
                [name, "not set" if value is None else value]
                for name, value in facts.training.settings.items()
            ],
        ),
        "software": table(["library", "version"], list(facts.software.items())),
        "failed": "\n".join(
            f"- **{check.name}:** {check.sentence.removeprefix(f'{check.name}: ')}"
            for check in facts.checks
            if not check.passed
        )
        or "None failed.",
        "checks": table(
            ["check", "result", "what was seen"],
            [
                [
                    check.name,
                    "passed" if check.passed else "FAILED",
                    check.sentence.removeprefix(f"{check.name}: "),
                ]
                for check in facts.checks
            ],
        ),
    }


def describe_data(data: DataFacts) -> dict[str, str]:
    """Return the tables of the data card, by name in its template."""
    return {
        "parts": table(
            ["batch", "split", "images", "came from", "sha256"],
            [[p.name, p.split, f"{p.images:,}", p.source, f"`{p.digest}`"] for p in data.parts],
        ),
        "labels": table(
            ["digit", "training images", "test images"],
            [
                [digit, f"{training:,}", f"{test:,}"]
                for digit, (training, test) in enumerate(
                    zip(data.training_labels, data.test_labels, strict=True)
                )
            ],
        ),
        "drift": table(
            ["figure", "value", "limit", "result"],
            [
                [d.name, f"{d.value:.4f}", f"{d.limit:.4f}", "within" if d.passed else "BEYOND"]
                for d in data.drift
            ],
        )
        if data.drift
        else "This is what the data set began with: nothing has arrived that could have drifted.",
    }


def _verdict(facts: CardFacts) -> str:
    failed = [check.name for check in facts.checks if not check.passed]
    passed = f"{len(facts.checks) - len(failed)} of {len(facts.checks)} checks passed"
    outcome = f"{passed}; failed: {', '.join(failed)}" if failed else passed
    return f"Verdict: **{facts.verdict}** ({outcome}): {facts.reason.rstrip('.')}."


_TITLES = {
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "loss": "cross entropy",
    "brier": "Brier score",
    "expected_error": "expected calibration error",
}


def _comparison(facts: CardFacts) -> str:
    compared = _compared(facts)
    rows = []
    for name, unit in (
        ("accuracy", "%"),
        ("macro_f1", "%"),
        ("loss", "nats"),
        ("brier", "0 to 2"),
        ("expected_error", "0 to 1"),
    ):
        row = [f"{_TITLES[name]}, {unit}"]
        for evaluation in compared.values():
            value = {
                "accuracy": evaluation.accuracy,
                "macro_f1": evaluation.macro_f1,
                "loss": evaluation.loss,
                "brier": evaluation.calibration.brier,
                "expected_error": evaluation.calibration.expected_error,
            }[name]
            interval = getattr(evaluation.intervals, name)
            scale, digits = (100, 2) if unit == "%" else (1, 4)
            row.append(
                f"{value * scale:.{digits}f} ({interval.low * scale:.{digits}f} to "
                f"{interval.high * scale:.{digits}f})"
            )
        rows.append(row)
    alone = "" if len(compared) > 1 else "\n\nThere was no champion to compare with."
    return table(["figure (95 % interval)", *compared], rows) + alone


def _classes(facts: CardFacts) -> str:
    compared = _compared(facts)
    header = ["digit", "support", "precision", "recall", "F1"]
    header += [f"F1 of {name}" for name in list(compared)[1:]]
    rows = [
        [
            metrics.digit,
            f"{metrics.support:,}",
            percent(metrics.precision),
            percent(metrics.recall),
            percent(metrics.f1),
            *[percent(other.classes[metrics.digit].f1) for other in list(compared.values())[1:]],
        ]
        for metrics in facts.candidate.classes
    ]
    return table(header, rows)


def _confused(evaluation: Evaluation) -> str:
    if not evaluation.confused:
        return "No digit was taken for another."
    return table(
        ["true digit", "read as", "images"],
        [[pair.true, pair.predicted, pair.images] for pair in evaluation.confused],
    )


def _conditions(facts: CardFacts, factor: str) -> str:
    from mnist_cnn.evaluation.corruptions import CORRUPTIONS

    compared = _compared(facts)
    # By corruption and strength: another model may have been measured under other conditions.
    others = [
        {(each.corruption, each.strength): each for each in other.conditions}
        for other in list(compared.values())[1:]
    ]
    levels = {
        (corruption.name, strength): f"{level}: "
        for corruption in CORRUPTIONS
        if corruption.factor == "noise level"
        for level, strength in zip(("low", "medium", "high"), corruption.strengths, strict=True)
    }
    rows = []
    for result in facts.candidate.conditions:
        if result.factor == factor:
            same = [other.get((result.corruption, result.strength)) for other in others]
            level = levels.get((result.corruption, result.strength), "")
            rows.append(
                [
                    result.corruption,
                    f"{level}{result.strength:g} {result.unit}",
                    f"{_accuracy_of(result)}{_interval(result)}",
                    *[_accuracy_of(each) for each in same],
                ]
            )
    return table(["corruption", "strength", *compared], rows)


def _interval(result: ConditionResult) -> str:
    interval = result.interval
    return f" ({interval.low * 100:.2f} to {interval.high * 100:.2f})" if interval else ""


def _accuracy_of(result: ConditionResult | None) -> str:
    if result is None or result.accuracy is None:
        return _or_gap(None, result.gap if result else "not among its conditions")
    return percent(result.accuracy)


def _sources() -> str:
    """Return the sources of the corruptions as a list, since no table is wide enough for them."""
    from mnist_cnn.evaluation.corruptions import CORRUPTIONS

    names = dict[str, list[str]]()
    for corruption in CORRUPTIONS:
        names.setdefault(corruption.source, []).append(corruption.name)
    lines = (f"- {', '.join(found)}: {source}" for source, found in names.items())
    # Identifiers become links. An arXiv number ends in a digit, so a full stop after it stays out.
    linked = re.sub(r"arXiv:([\d.]+\d)", r"[\g<0>](https://arxiv.org/abs/\1)", "\n".join(lines))
    return re.sub(r"doi:([\w./]+)", r"[\g<0>](https://doi.org/\1)", linked)


def _slices(facts: CardFacts) -> str:
    return table(
        ["style", "from", "to", "images", "accuracy", "95 % interval"],
        [
            [
                f"{part.style}, {part.unit}",
                f"{part.low:.3g}",
                f"{part.high:.3g}",
                f"{part.images:,}",
                percent(part.accuracy),
                f"{percent(part.interval.low)} to {percent(part.interval.high)}",
            ]
            for part in facts.candidate.slices
        ],
    )


def _shift(evaluation: Evaluation) -> str:
    if evaluation.shift is None:
        return "Not measured: no training split was at hand to compare the test split with."
    rows = [
        [
            f"{style.style}, {style.unit}",
            f"{style.training_mean:.3f}",
            f"{style.test_mean:.3f}",
            f"{style.difference:+.3f}",
            f"{style.distance:.4f}",
        ]
        for style in evaluation.shift.styles
    ]
    return (
        f"Total variation distance of the label distributions: "
        f"{evaluation.shift.label_distance:.4f} (0: the same, 1: disjoint). Below, the difference "
        "of the means is in standard deviations (SD) of the training images, and KS is the "
        "Kolmogorov-Smirnov distance of the distributions (0: the same, 1: disjoint).\n\n"
        + table(
            ["statistic", "training mean", "test mean", "difference, SD", "KS distance"],
            rows,
        )
    )


def _priors(evaluation: Evaluation) -> str:
    worst = evaluation.priors.worst
    name = f"worst case within a total variation distance of {evaluation.priors.radius:g}"
    rows = [
        [scenario.name, _or_gap(scenario.accuracy, scenario.gap)]
        for scenario in evaluation.priors.scenarios
    ]
    rows.append([name, _or_gap(worst.accuracy, worst.gap)])
    return table(["label priors", "accuracy"], rows)


def _or_gap(accuracy: float | None, gap: str | None) -> str:
    return f"{percent(accuracy)}: {gap}" if gap else percent(accuracy)


def _confidence(evaluation: Evaluation) -> str:
    confidence = evaluation.confidence
    return table(
        ["figure", "value"],
        [
            ["errors", f"{confidence.errors:,} of {evaluation.images:,}"],
            ["mean confidence when right", percent(confidence.when_right)],
            ["mean confidence when wrong", percent(confidence.when_wrong)],
            [
                f"errors with a confidence of at least {SURE * 100:.0f} %",
                f"{confidence.confident_errors:,}",
            ],
            ["chance that a right answer is surer than a wrong one", percent(confidence.ranking)],
        ],
    )


def _costs(facts: CardFacts) -> str:
    evaluation = facts.candidate
    training = facts.training
    rows = [
        ["training started", f"{training.started:%Y-%m-%d %H:%M:%S %Z}"],
        ["training time", f"{training.seconds:.1f} s"],
        ["training speed", f"{training.images_per_second:,.0f} images a second"],
    ]
    if evaluation.size:
        stored = evaluation.size.file_bytes
        rows += [
            ["parameters", f"{evaluation.size.parameters:,}"],
            ["multiply-accumulates an image", f"{evaluation.size.multiply_accumulates:,}"],
            ["stored model", "not measured" if stored is None else f"{stored / 1000:,.1f} kB"],
        ]
    if evaluation.times:
        times = evaluation.times
        device = f"{times.device}, {times.threads} thread{'s' * (times.threads > 1)}"
        rows += [
            [
                f"one image ({device})",
                f"{times.single_image_ms:.2f} ms median, {times.single_image_p95_ms:.2f} ms p95",
            ],
            [
                f"batches of {times.batch_size} ({device})",
                f"{times.batch_images_per_second:,.0f} images a second",
            ],
        ]
    return table(["figure", "value"], rows)


def _hardest(evaluation: Evaluation) -> ConditionResult | None:
    """Return the condition of least accuracy; None if none was measured."""
    known = [result for result in evaluation.conditions if result.accuracy is not None]
    return min(known, key=lambda result: result.accuracy or 0, default=None)


def _summary(evaluation: Evaluation) -> str:
    interval = evaluation.intervals.accuracy
    # A digit without test images has no recall; it cannot be the weakest.
    weakest = min(
        (metrics for metrics in evaluation.classes if metrics.recall is not None),
        key=lambda metrics: metrics.recall or 0,
    )
    within = f"95 % interval {percent(interval.low)} to {percent(interval.high)}"
    read = f"{percent(evaluation.accuracy)} of {evaluation.images:,} test images are read rightly"
    sentences = [
        f"{read} ({within}).",
        f"The digit it misses most is {weakest.digit} (recall {percent(weakest.recall)}).",
    ]
    if evaluation.confused:
        pair = evaluation.confused[0]
        sentences.append(
            f"Its most frequent confusion is a {pair.true} read as a {pair.predicted} "
            f"({pair.images} image{'s' * (pair.images > 1)})."
        )
    return " ".join([*sentences, _weakness(evaluation)])


def _weakness(evaluation: Evaluation) -> str:
    sentences = []
    if hardest := _hardest(evaluation):
        sentences.append(
            f"Of the corruptions, {hardest.corruption} at {hardest.strength:g} {hardest.unit} "
            f"costs most: {percent(hardest.accuracy)} are still read rightly."
        )
    if evaluation.slices:
        part = min(evaluation.slices, key=lambda each: each.accuracy)
        sentences.append(
            f"Of the natural styles, {part.style} from {part.low:.3g} to {part.high:.3g} "
            f"{part.unit} is hardest ({percent(part.accuracy)} of {part.images:,} images)."
        )
    return " ".join(sentences) or "No condition or slice could be measured."


def _risk(evaluation: Evaluation) -> str:
    confidence = evaluation.confidence
    confident = confidence.confident_errors
    count = f"{confident} of its {confidence.errors} errors on the test images were made"
    lesson = (
        "so that a threshold on confidence alone does not catch every error."
        if confident
        else "but other images may bring such errors."
    )
    return f"{count} with a confidence of at least {SURE * 100:.0f} %, {lesson}"


def _decimal(value: float) -> str:
    """Return three significant digits, never in the form 5e-05."""
    return np.format_float_positional(value, precision=3, unique=False, fractional=False, trim="-")


def _environment(facts: CardFacts) -> str:
    hardware = facts.hardware
    energy = facts.energy
    machine = f"{hardware.processor}, {hardware.cores} cores"
    if hardware.accelerator:
        machine += f", {hardware.accelerator}"
    if energy is None:
        return (
            f"- **Hardware Type:** {machine}\n"
            f"- **Hours used:** {facts.training.seconds / 3600:.4f} (training)\n"
            "- **Cloud Provider, Compute Region, Carbon Emitted, Energy:** not measured in this run"
        )
    return (
        f"- **Hardware Type:** {machine}\n"
        f"- **Hours used:** {energy.hours:.4f}, training\n"
        f"- **Cloud Provider:** {energy.provider}\n"
        f"- **Compute Region:** {energy.region}\n"
        f"- **Carbon Emitted:** {_decimal(energy.grams_co2e)} gCO2e (an estimate)\n"
        f"- **Energy:** {_decimal(energy.kwh)} kWh (an estimate by {energy.tool}: {energy.method})"
    )
