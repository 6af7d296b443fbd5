"""Plant faults in front of the gates of the weekly run, and see each of them refused.

The gates are the real ones: the evaluation, the decision and the loader of the other tasks, which
this module therefore imports. Planted models live in memory and are never registered; planted data
lie under a prefix that is removed.
"""

import tempfile
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

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
from tasks.registry.versions import registry_errors
from tasks.services.s3 import Store
from tasks.services.step import step

_NOISE = "Gaussian noise=0.08"


class GateResult(BaseModel, frozen=True):
    """What a gate did with something that was planted."""

    planted: str
    gate: str
    expected: str
    found: str
    holds: bool


@step
def copy_snapshot(snapshot: Snapshot, scratch: str) -> Snapshot:
    """Write the data to a store of the check's own, where everything else is planted beside it."""
    train, test = read_split(snapshot, "train"), read_split(snapshot, "test")
    return write_snapshot(Store(scratch), snapshot.dataset, train, test, "a copy")


@step
def check_decisions(
    champion: ModelVersion, snapshot: Snapshot, policy: PromotionPolicy | None
) -> list[GateResult]:
    """Measure planted models beside the champion that they are made of, and decide on each.

    Each has to be kept out by the check that is there for its fault. The champion itself has to
    pass: a gate that lets nothing through would also refuse every fault.
    """
    from mnist_cnn.evaluation.faulty_models import plant_faults

    store = Store(snapshot.store)
    train, test = read_split(snapshot, "train"), read_split(snapshot, "test")
    good, size = load_model(champion.model)
    named = [name for name in policy.factor_floors if name.startswith("Gaussian")] if policy else []
    faults = plant_faults(good, test, named[0] if named else _NOISE)
    networks = {"champion": (good, size)} | {fault.name: (fault.model, size) for fault in faults}
    addresses = {name: f"planted: {name}" for name in networks}
    measured, _ = evaluate_networks(networks, addresses, snapshot, (train, test))
    split = test.digest()
    scored = {
        name: score(found, store, test, split, snapshot.until) for name, found in measured.items()
    }
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
        until = datetime.now(UTC) if fault.newer else snapshot.until
        planted = replace(scored[fault.name], data_until=until)
        decision = decide(planted, scored["champion"], policy, ReuseHistory(split))
        results.append(_judge(fault.name, fault.refused_by, decision))
    return results


@step
@registry_errors("the champion to damage")
def check_loading(champion: ModelVersion) -> GateResult:
    """Cut the champion's file in half, in a copy, and load that."""
    import mlflow.artifacts

    with tempfile.TemporaryDirectory() as folder:
        copy = Path(mlflow.artifacts.download_artifacts(champion.model, dst_path=folder))
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
    """Write poisoned copies of a snapshot beside it."""
    train, test = read_split(snapshot, "train"), read_split(snapshot, "test")
    rng = np.random.default_rng(0)
    shuffled = train.labels.copy()
    half = rng.permutation(len(shuffled))[: len(shuffled) // 2]
    shuffled[half] = rng.permutation(shuffled[half])
    leaked = train.images.copy()
    leaked[: len(test) // 10] = test.images[: len(test) // 10]
    labels = train.labels.copy()
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
    """Tell whether the validation refused poisoned data."""
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
    """Publish a table of what was planted and what became of it."""
    rows = [
        {"result": "holds" if result.holds else "OPEN", **result.model_dump(exclude={"holds"})}
        for result in results
    ]
    for row in rows:
        get_run_logger().info("%(result)s  %(gate)s  %(planted)s  %(found)s", row)
    create_table_artifact(rows, key="gates", description="What was planted, and what became of it")


@step
def clear(scratch: str) -> None:
    """Remove everything that was planted."""
    store = Store(scratch)
    for name in store.names(""):
        store.remove(name)


def _judge(name: str, refused_by: tuple[str, ...], decision: Decision) -> GateResult:
    failed = {check.name for check in decision.checks if not check.passed}
    return GateResult(
        planted=name,
        gate="decision",
        expected=f"keep, by: {', '.join(refused_by)}",
        found=f"{decision.verdict}: {decision.reason}",
        holds=decision.verdict == "keep" and failed.issuperset(refused_by),
    )
