"""Plant faults in front of the gates of the weekly run, and verify that each is refused.

The gates are the real ones: the evaluation, the decision and the loader of the other tasks, which
this module therefore imports. Faulty models live in memory and are never registered; poisoned data
lie under a prefix that is removed.
"""

import tempfile
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
from prefect import get_run_logger
from prefect.artifacts import create_table_artifact
from pydantic import BaseModel

from mnist_cnn.digits import Digits
from mnist_cnn.promotion import Decision, PromotionPolicy, ReuseHistory, decide
from tasks.datasets.snapshots import read_split, write_snapshot
from tasks.decide import score
from tasks.evaluate import evaluate_networks
from tasks.records import ModelVersion, RejectedSnapshot, Snapshot, ValidatedSnapshot
from tasks.registry.models import ModelUnusable, load_model
from tasks.registry.versions import download
from tasks.services.mlflow import registry_errors
from tasks.services.s3 import Store
from tasks.services.step import step

_NOISE = "Gaussian noise=0.08"


class GateResult(BaseModel, frozen=True):
    """The verdict of a gate on a planted fault."""

    planted: str
    gate: str
    expected: str
    found: str
    holds: bool


@step
def copy_snapshot(snapshot: Snapshot, scratch: str) -> Snapshot:
    """Copy the data to a store of the check's own, where the poisoned copies are written too."""
    train = read_split(snapshot, "train")
    test = read_split(snapshot, "test")
    return write_snapshot(Store(scratch), snapshot.dataset, train, test, "a copy")


@step
def check_decisions(
    champion: ModelVersion, snapshot: Snapshot, policy: PromotionPolicy | None
) -> list[GateResult]:
    """Evaluate faulty models beside the champion that they are made from, and decide on each.

    Each must be kept out by the check for its fault. The champion itself must pass: a gate that
    lets nothing through would also refuse every fault.
    """
    from mnist_cnn.evaluation.faulty_models import plant_faults

    store = Store(snapshot.store)
    train = read_split(snapshot, "train")
    test = read_split(snapshot, "test")
    good, size = load_model(champion.model)
    # A condition with Gaussian noise that the policy names, or else the default one.
    named = [name for name in policy.factor_floors if name.startswith("Gaussian")] if policy else []
    faults = plant_faults(good, test, named[0] if named else _NOISE)
    networks = {"champion": (good, size)} | {fault.name: (fault.model, size) for fault in faults}
    addresses = {name: f"planted: {name}" for name in networks}
    measured, _ = evaluate_networks(networks, addresses, snapshot, (train, test))
    split = test.digest()
    scored = {
        name: score(found, store, test, split, snapshot.until) for name, found in measured.items()
    }
    # Without an opponent, as if it were the first model of its data set.
    itself = decide(scored["champion"], None, policy, ReuseHistory(split))
    results = [
        GateResult(
            planted="nothing: the champion itself",
            gate="decision",
            expected="promote",
            found=f"{itself.verdict}: {itself.reason}",
            holds=itself.verdict == "promote",
        )
    ]
    for fault in faults:
        # The decision demands a gain on the same data, and only no loss on newer data.
        until = datetime.now(UTC) if fault.newer else snapshot.until
        planted = replace(scored[fault.name], data_until=until)
        decision = decide(planted, scored["champion"], policy, ReuseHistory(split))
        results.append(_judge(fault.name, fault.refused_by, decision))
    return results


@step
@registry_errors("the champion to damage")
def check_loading(champion: ModelVersion) -> GateResult:
    """Load a copy of the champion whose weights file is cut in half: it must be refused."""
    with tempfile.TemporaryDirectory() as folder:
        copy = download(champion.model, folder)
        weights = copy / "data" / "model.pt2"
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
        try:
            load_model(str(copy))
            found = "it was loaded"
        except ModelUnusable as error:
            found = f"refused: {error}"
    return GateResult(
        planted="a truncated model file",
        gate="loading",
        expected="refused",
        found=found,
        holds=found.startswith("refused"),
    )


@step
def poison(snapshot: Snapshot) -> dict[str, Snapshot]:
    """Write poisoned copies of a snapshot beside it; return each by the name of its fault."""
    train = read_split(snapshot, "train")
    test = read_split(snapshot, "test")
    rng = np.random.default_rng(0)
    # A random half of the labels is permuted among itself: the count of each digit stays the same.
    shuffled = train.labels.copy()  # (N,)
    half = rng.permutation(len(shuffled))[: len(shuffled) // 2]  # (N // 2,)
    shuffled[half] = rng.permutation(shuffled[half])
    # A tenth of the test split, with its labels, replaces as many training images.
    leaked = train.images.copy()  # (N, 28, 28)
    leaked[: len(test) // 10] = test.images[: len(test) // 10]
    labels = train.labels.copy()  # (N,)
    labels[: len(test) // 10] = test.labels[: len(test) // 10]
    poisoned = {
        "half of the training labels shuffled": Digits(train.images, shuffled),
        "test images among the training images": Digits(leaked, labels),
    }
    store = Store(snapshot.store)
    return {
        name: write_snapshot(store, snapshot.dataset, digits, test, f"planted: {name}")
        for name, digits in poisoned.items()
    }


def judge_validation(name: str, answer: ValidatedSnapshot | RejectedSnapshot) -> GateResult:
    """Return the result of validating poisoned data: it must be refused."""
    refusals = answer.failures if isinstance(answer, RejectedSnapshot) else []
    return GateResult(
        planted=name,
        gate="validation",
        expected="refused",
        found="refused: " + "; ".join(refusals) if refusals else "it was passed",
        holds=bool(refusals),
    )


@step
def report_gates(results: list[GateResult]) -> None:
    """Log the results and publish them as a table."""
    rows = [
        {"result": "holds" if result.holds else "OPEN", **result.model_dump(exclude={"holds"})}
        for result in results
    ]
    for row in rows:
        get_run_logger().info("%(result)s  %(gate)s  %(planted)s  %(found)s", row)
    create_table_artifact(rows, key="gates", description="What was planted, and what became of it")


@step
def clear(scratch: str) -> None:
    """Remove all objects of the check's own store."""
    store = Store(scratch)
    for name in store.names(""):
        store.remove(name)


def _judge(name: str, refused_by: tuple[str, ...], decision: Decision) -> GateResult:
    # "keep" is not enough: it may be for another reason than the planted fault.
    failed = {check.name for check in decision.checks if not check.passed}
    return GateResult(
        planted=name,
        gate="decision",
        expected=f"keep, by: {', '.join(refused_by)}",
        found=f"{decision.verdict}: {decision.reason}",
        holds=decision.verdict == "keep" and failed.issuperset(refused_by),
    )
