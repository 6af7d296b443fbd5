"""Run four weeks and a rollback in a few minutes, on a data set of the tour's own.

Its images are a part of MNIST's training split, or of the embedded sample where MNIST cannot be
downloaded. Every run goes through its deployment on the local stack; no other data set's champion
changes.
"""

import sys
from dataclasses import astuple, dataclass
from datetime import UTC, datetime

import numpy as np
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.utilities.urls import url_for

from deployments.columns import columns
from deployments.drop import drop
from deployments.stack import PROJECT, Stack, start
from deployments.watch import (
    WATCHING_ENDS,
    connect_to_prefect,
    errors_as_sentences,
    print_verdict,
    trigger,
    watch,
)
from mnist_cnn.digits import Digits
from mnist_cnn.idx import write_idx
from mnist_cnn.promotion import PromotionPolicy
from mnist_cnn.sample import embedded_sample
from tasks import keys
from tasks.arrivals.batch_files import write_parquet
from tasks.datasets.base import BASE_ARCHIVES
from tasks.datasets.ledger import read_ledger
from tasks.datasets.mirror import MirrorUnreachable, fetch_mnist
from tasks.promote import find_champion
from tasks.records import RunSummary
from tasks.services.markdown import percent
from tasks.services.s3 import Store, default_store

SEED = 1
ENDS = ["Promoted", "Promoted", "Skipped", "Skipped", "Rolled back"]
"""Expected final states of the runs, in order: four weeks and the rollback."""

# The second decision on a test split has the level 0.0083, at which 22 images of a digit prove a
# margin of 0.2 if none is lost, and 240 images one of 0.02.
POLICY = PromotionPolicy(
    accuracy_floor=0.9,
    worst_class_floor=0.75,
    shifted_prior_floor=0.85,
    factor_floors={"rotation=15": 0.6, "Gaussian noise=0.08": 0.6, "occlusion=4": 0.6},
    calibration_ceiling=0.4,
    overall_margin=0.02,
    class_margin=0.2,
    factor_margin=0.08,
)
"""Policy for a small data set.

A model that was trained on some thousand images reaches the floors, and a test split of a few
hundred images can prove the margins.
"""


Sizes = tuple[int, int, int, int, int]
"""Number of images in each of the `Parts`."""


@dataclass(frozen=True, eq=False)
class Parts:
    """The splits that the tour's data set begins with, and the batches that arrive."""

    train: Digits
    test: Digits
    good: Digits
    shuffled: Digits
    """With permuted labels: ingest has to refuse it."""
    inverted: Digits
    """With dark digits on a bright background: ingest has to refuse it."""


@dataclass(frozen=True)
class Row:
    """One row of the printed table: a week, or the rollback."""

    week: str
    arrived: str
    verdict: str
    accuracy: str
    champion: str
    seconds: str


def main() -> int:
    """Run the tour; return 0 only if every run ended as in `ENDS`."""
    return errors_as_sentences(_tour, WATCHING_ENDS)


def _tour() -> int:
    start(Stack.configured(), deploy=PROJECT / "deployments" / "prefect.yaml")
    with connect_to_prefect(local=True) as prefect:
        rows, links = tell(prefect, f"tour-{datetime.now(UTC):%Y%m%d-%H%M%S}", cut())
    print(f"\n{table(rows)}\n")
    for name, address in links.items():
        print(f"  {name:<26} {address}")
    if [row.verdict for row in rows] != ENDS:
        print(f"\nThe story did not hold: expected {', '.join(ENDS)}", file=sys.stderr)
        return 1
    print("\nThe stack stays up. Stop it with: make down")
    return 0


def cut() -> Parts:
    """Draw the tour's images from MNIST, else from the sample; the same ones in each tour."""
    try:
        return divide(fetch_mnist()[0], (1_500, 2_000, 10_000, 1_000, 1_000))
    except MirrorUnreachable as error:
        print(f"MNIST COULD NOT BE HAD: the tour uses the embedded sample ({error})")
        return sample_parts()


def sample_parts(sizes: Sizes = (1_000, 480, 117, 100, 100)) -> Parts:
    """Return the parts where MNIST cannot be downloaded: all of the sample's 1,797 images.

    A snapshot has at least 1,000 training images, and more than these hardly improve a model on the
    sample. The second model is therefore promoted as newer and proved to be no worse. That proof
    needs a large test split: with 360 images a single one that is lost may cost it.
    """
    train, test = embedded_sample()
    images = np.concatenate([train.images, test.images])  # (1797, 28, 28)
    labels = np.concatenate([train.labels, test.labels])  # (1797,)
    return divide(Digits(images, labels), sizes)


def divide(known: Digits, sizes: Sizes) -> Parts:
    """Split `known` at random into parts of these sizes, and make the last two faulty."""
    random = np.random.default_rng(SEED)
    # One permutation, cut into consecutive pieces: no image is in two parts.
    order = random.permutation(len(known))[: sum(sizes)]  # (sum(sizes),)
    pieces = np.split(order, np.cumsum(sizes)[:-1])
    train, test, good, other, upright = (
        Digits(known.images[piece], known.labels[piece]) for piece in pieces
    )
    return Parts(
        train,
        test,
        good,
        shuffled=Digits(other.images, random.permutation(other.labels)),
        inverted=Digits(255 - upright.images, upright.labels),
    )


def begin(dataset: str, parts: Parts) -> None:
    """Upload the four base archives of the data set to the store."""
    contents = [
        write_idx(array)
        for split in (parts.train, parts.test)
        for array in (split.images, split.labels.astype(np.uint8))
    ]
    for name, content in zip(BASE_ARCHIVES, contents, strict=True):
        Store(default_store()).put(keys.archives(dataset, name), content)


def tell(
    prefect: SyncPrefectClient, dataset: str, parts: Parts
) -> tuple[list[Row], dict[str, str]]:
    """Run all weeks and the rollback; return a row for each, and links by name."""
    begin(dataset, parts)
    weeks: list[dict[str, Digits]] = [
        {},
        {"good": parts.good},
        {"shuffled-labels": parts.shuffled, "inverted": parts.inverted},
        {},
    ]
    params = [f"dataset={dataset}", f"promotion={POLICY.model_dump_json(exclude_defaults=True)}"]
    rows: list[Row] = []
    links: dict[str, str] = {}
    for number, batches in enumerate(weeks, start=1):
        arrived = ", ".join(f"{name} ({len(digits):,})" for name, digits in batches.items())
        arrived = arrived or ("nothing" if number > 1 else f"base ({len(parts.train):,})")
        print(f"\n== Week {number}: {arrived} ==")
        for name, digits in batches.items():
            print("dropped:", drop(dataset, name, {"part.parquet": write_parquet(digits)}))
        run = watch(prefect, trigger(prefect, "train/weekly", params))
        summary = _conclude(f"week {number}", run, links)
        rows.append(_row(f"{number}", arrived, run, dataset, summary))
    store = Store(default_store())
    for verdict in read_ledger(store, dataset):
        if not verdict.accepted and verdict.report:
            links[f"refused: {verdict.batch}"] = store.link(store.name_of(verdict.report))
    print("\n== A rollback ==")
    params = [f"model={dataset}-cnn", "reason=the tour shows a rollback", "who=the tour"]
    run = watch(prefect, trigger(prefect, "promote/rollback", params))
    _conclude("rollback", run, links)
    return [*rows, _row("", "a rollback", run, dataset, None)], links


def table(rows: list[Row]) -> str:
    """Return the rows as lines of text in equal columns, under the names of the fields."""
    return columns([tuple(Row.__annotations__), *(astuple(row) for row in rows)])


def _conclude(name: str, run: FlowRun, links: dict[str, str]) -> RunSummary | None:
    """Print a run's verdict and add its links; return its summary, or None if it wrote none."""
    print_verdict(run)
    links[f"{name}: run"] = url_for(run) or ""
    try:
        content = Store(default_store()).get(keys.record(run.id, "summary"))
    except FileNotFoundError:  # a rollback writes none, nor does a run that failed early
        return None
    summary = RunSummary.model_validate_json(content)
    if version := summary.links.get("registered version"):
        links[f"{name}: version"] = version
    return summary


def _row(week: str, arrived: str, run: FlowRun, dataset: str, summary: RunSummary | None) -> Row:
    assert run.state
    # Read from the registry, not from a summary: a rollback writes none.
    champion = find_champion.fn(f"{dataset}-cnn")
    measured = summary and summary.accuracy
    return Row(
        week=week,
        arrived=arrived,
        verdict=str(run.state.name),
        accuracy=percent(measured) if measured else "not trained",
        champion=f"version {champion.version}" if champion else "none",
        seconds=f"{run.total_run_time.total_seconds():.0f}",
    )


if __name__ == "__main__":
    sys.exit(main())
