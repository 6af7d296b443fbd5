"""Simulate 200 weeks of promotions, and compare the rules by what they do to the true accuracy.

    MNIST_MIRROR=file:///path/to/archives python tests/benchmarks/promotion.py --weeks 200

Models are trained on the first 40,000 images of MNIST's training split, and their outcomes on the
other 20,000 are the population: a model's true accuracy is its accuracy on all of them. MNIST's own
test split is not touched. A candidate takes, for each of 40 blocks of the population, the outcomes
of a random one of the trained models, so that there are as many candidates as weeks, which agree
and differ on images as real models do. A test split is 10,000 images drawn with replacement, once
for each repetition, and decides in all of its weeks, as in production. Each recipe is simulated
twice: every candidate counts as trained on newer data than the champion, in which case `decide` is
most willing, or all of them on the same data.
"""

import argparse
import hashlib
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.request import urlopen

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from mnist_cnn.digits import Digits
from mnist_cnn.evaluation import predict
from mnist_cnn.idx import digits_from_idx
from mnist_cnn.promotion import PromotionPolicy, ReuseHistory, Scored, Verdict, decide
from mnist_cnn.training import TrainingConfig, train

FIT, BLOCKS, TEST, WORSE = 40_000, 40, 10_000, 0.001
CONDITIONS = ("clean", "noise", "blur")
"""As they are; Gaussian noise of 0.15 of full ink; Gaussian blur of 1 px."""
POLICY = PromotionPolicy(factor_floors=dict.fromkeys(CONDITIONS[1:], 0.9))
RECIPES = {
    "same recipe, other seeds": [TrainingConfig(seed=seed) for seed in range(14)],
    "damaged recipe, half of the epochs": [
        TrainingConfig(seed=seed, epochs=1) for seed in range(200, 204)
    ],
    "damaged recipe, a quarter of the epochs": [
        TrainingConfig(seed=seed, epochs=0.5) for seed in range(100, 104)
    ],
}

Truth = NDArray[np.bool_]
"""Who is right where: conditions by images of the population."""


@dataclass(frozen=True)
class Population:
    labels: NDArray[np.int64]
    models: dict[str, NDArray[np.bool_]]
    """By recipe: models by conditions by images."""


def read_training_split(mirror: str) -> Digits:
    """Read MNIST's training split from a folder at an http(s) or file address."""
    names = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")
    images, labels = (urlopen(f"{mirror.rstrip('/')}/{name}").read() for name in names)  # noqa: S310 - the user's own address
    return digits_from_idx(images, labels, "train")


def train_population(cache: Path, mirror: str) -> Population:
    """Train every model and keep its outcomes in `cache`; a second call only reads them."""
    models: dict[str, list[Truth]] = {recipe: [] for recipe in RECIPES}
    digits = read_training_split(mirror)
    fit = Digits(digits.images[:FIT].copy(), digits.labels[:FIT].copy())
    held, labels = digits.images[FIT:].copy(), digits.labels[FIT:]
    views: dict[str, NDArray[np.uint8]] = {}
    cache.mkdir(parents=True, exist_ok=True)
    for recipe, configs in RECIPES.items():
        for config in configs:
            recipe_digest = hashlib.sha256(config.recipe().model_dump_json().encode()).hexdigest()
            path = cache / f"{recipe_digest[:8]}-{config.seed}.npy"
            if not path.exists():
                views = views or corrupt(held)
                model = train(fit, config, "cpu").model
                right = [predict(model, views[name]).argmax(1) == labels for name in CONDITIONS]
                np.save(path, np.stack(right))
                shares = [round(float(share.mean()), 4) for share in right]
                print(f"{path.name}: {shares}", flush=True)
            models[recipe].append(np.load(path))
    return Population(labels, {recipe: np.stack(rights) for recipe, rights in models.items()})


def corrupt(images: NDArray[np.uint8]) -> dict[str, NDArray[np.uint8]]:
    """Return uint8 (N, 28, 28) under each condition."""
    noise = np.random.default_rng(0).normal(0, 0.15 * 255, images.shape)
    noisy = np.clip(images + noise, 0, 255).astype(np.uint8)
    blurred = np.rint(gaussian_filter(images.astype(float), (0, 1, 1))).astype(np.uint8)
    return dict(zip(CONDITIONS, (images, noisy, blurred), strict=True))


def compose(models: NDArray[np.bool_], draw: np.random.Generator) -> Truth:
    """Make a candidate: each block of images from a random model."""
    images = models.shape[2]
    source = draw.integers(len(models), size=BLOCKS)[np.arange(images) * BLOCKS // images]
    candidate: Truth = models[source, :, np.arange(images)].T
    return candidate


def score(
    truth: Truth,
    population: Population,
    chosen: NDArray[np.int64],
    week: int,
    *,
    newer: bool = True,
) -> Scored:
    """Return what the test split `chosen` says of a model; its other figures are a good model's."""
    return Scored(
        model=f"week {week}",
        snapshot="simulated",
        test_split="simulated",
        labels=population.labels[chosen],
        right=truth[0, chosen],
        factors={name: truth[place, chosen] for place, name in enumerate(CONDITIONS) if place},
        data_until=datetime(2026, 1, 1, tzinfo=UTC) + timedelta(weeks=week) if newer else None,
        shifted_prior_accuracy=0.99,
        calibration_error=0.1,
        error_confidence=0.5,
        latency_ms=0.3,
        size_bytes=150_000,
    )


Rule = Callable[[Scored, Scored, ReuseHistory], Verdict]


def weigh(ours: Scored, theirs: Scored, history: ReuseHistory) -> Verdict:
    """Decide as production does."""
    return decide(ours, theirs, POLICY, history).verdict


def compare_accuracy(ours: Scored, theirs: Scored, _: ReuseHistory) -> Verdict:
    """Decide as a public system does."""
    return "promote" if ours.right.mean() >= theirs.right.mean() else "keep"


RULES: dict[str, tuple[Rule, set[Verdict]]] = {
    "accuracy at least as high": (compare_accuracy, {"promote"}),
    "decide; approvals refused": (weigh, {"promote"}),
    "decide; approvals all granted": (weigh, {"promote", "needs-approval"}),
}
"""By name: how to decide, and which verdicts lead to a promotion."""


def simulate(
    population: Population, recipe: str, rule: str, weeks: int, seed: int, *, newer: bool
) -> dict[str, float]:
    """Run one test split through `weeks` decisions; one seed shows each rule the same weeks."""
    decides, promoting = RULES[rule]
    draw = np.random.default_rng(seed)
    chosen = draw.integers(len(population.labels), size=TEST)
    champion = compose(population.models["same recipe, other seeds"], draw)
    standing = score(champion, population, chosen, 0, newer=newer)
    start = champion[0].mean()
    seen = [standing.model]
    counts = {"promotions": 0, "asked": 0, "worse candidates": 0, "worse promoted": 0}
    for week in range(1, weeks + 1):
        truth = compose(population.models[recipe], draw)
        challenger = score(truth, population, chosen, week, newer=newer)
        worse = champion[0].mean() - truth[0].mean() >= WORSE - 1e-12
        counts["worse candidates"] += worse
        verdict = decides(challenger, standing, ReuseHistory("simulated", tuple(seen)))
        counts["asked"] += verdict == "needs-approval"
        if verdict in promoting:
            counts["promotions"] += 1
            counts["worse promoted"] += worse
            champion, standing = truth, challenger
        seen.append(challenger.model)
    return {**counts, "drift": float(champion[0].mean() - start)}


def time_decide(population: Population) -> tuple[float, int]:
    """Return the median seconds of `decide` on 10,000 images and how many conditions it weighed."""
    names = [f"condition {number}" for number in range(48)]
    policy = PromotionPolicy(factor_floors=dict.fromkeys(names, 0.5))
    ours, theirs = (
        score(truth, population, np.arange(TEST), week)
        for week, truth in enumerate(population.models["same recipe, other seeds"][:2])
    )
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        decide(
            replace(ours, factors=dict.fromkeys(names, ours.factors["blur"])),
            replace(theirs, factors=dict.fromkeys(names, theirs.factors["blur"])),
            policy,
            ReuseHistory("simulated"),
        )
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds)), len(names)


def main() -> None:
    """Print the table and write the figures beside it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weeks", type=int, default=200)
    parser.add_argument("--repetitions", type=int, default=100)
    folder = Path(tempfile.gettempdir()) / "promotion-benchmark"
    parser.add_argument("--cache", type=Path, default=folder)
    parser.add_argument("--output", type=Path, default=folder / "promotion.json")
    options = parser.parse_args()
    population = train_population(options.cache, os.environ["MNIST_MIRROR"])
    seconds, conditions = time_decide(population)
    print(f"decide: {seconds * 1000:.0f} ms for 10,000 images and {conditions} conditions")
    rows = []
    for recipe, newer in itertools.product(RECIPES, (True, False)):
        accuracies = population.models[recipe][:, 0].mean(1)
        print(
            f"\n{recipe}, {'newer' if newer else 'the same'} data: {len(accuracies)} models, true "
            f"accuracy {accuracies.min():.4f} to {accuracies.max():.4f}; {options.repetitions} "
            f"times {options.weeks} weeks"
        )
        print(
            f"{'rule':30s} {'promotions':>10s} {'asked':>6s} {'worse candidates':>16s} "
            f"{'worse promoted':>14s} {'drift, points: mean':>19s} {'s.e.':>6s} {'least':>7s}"
        )
        for rule in RULES:
            runs = [
                simulate(population, recipe, rule, options.weeks, seed, newer=newer)
                for seed in range(options.repetitions)
            ]
            mean = {key: float(np.mean([run[key] for run in runs])) for key in runs[0]}
            drifts = [run["drift"] for run in runs]
            error = float(np.std(drifts)) / options.repetitions**0.5
            spread = {"drift error": error, "least drift": min(drifts)}
            rows.append({"recipe": recipe, "newer": newer, "rule": rule, **mean, **spread})
            print(
                f"{rule:30s} {mean['promotions']:10.2f} {mean['asked']:6.1f} "
                f"{mean['worse candidates'] / options.weeks:16.2%} "
                f"{mean['worse promoted'] / options.weeks:14.4%} "
                f"{mean['drift'] * 100:+19.3f} {error * 100:6.3f} {min(drifts) * 100:+7.3f}",
                flush=True,
            )
    figures = {"weeks": options.weeks, "repetitions": options.repetitions}
    options.output.write_text(
        json.dumps({**figures, "decide seconds": seconds, "rows": rows}, indent=1)
    )
    print(f"\nwritten to {options.output}")


if __name__ == "__main__":
    main()
