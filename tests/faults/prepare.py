"""Data sets of their own with a champion, made in a second: each pair of the table begins with one.

One model is trained for all of them, and registered under the name of each.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from mlflow import MlflowClient
from prefect.client.schemas.objects import FlowRun

from deployments.drop import drop
from deployments.tour import Parts, begin, sample_parts
from expectations.image_table import image_table
from mnist_cnn.digits import Digits
from mnist_cnn.promotion import PromotionPolicy
from mnist_cnn.training import TrainingConfig
from tasks.arrivals.batch_files import write_parquet
from tasks.datasets.catalog import entry_of
from tasks.datasets.ledger import settle, write_base, write_verdict
from tasks.datasets.snapshots import extend_snapshot, write_shards, write_snapshot
from tasks.records import BatchVerdict, ModelVersion, Snapshot, ValidatedSnapshot
from tasks.registry.aliases import move_champion
from tasks.registry.history import Account
from tasks.registry.versions import CHALLENGER, describe
from tasks.services.s3 import DEFAULT_STORE, Store
from tasks.validate import validation_key
from tests.faults.bench import Bench

POLICY = PromotionPolicy(
    accuracy_floor=0.1,
    worst_class_floor=0.001,
    shifted_prior_floor=0.01,
    factor_floors={"rotation=15": 0.01},
    calibration_ceiling=0.99,
    error_confidence_ceiling=0.99,
    latency_ceiling_ms=1000,
    overall_margin=0.5,
    class_margin=0.99,
    factor_margin=0.9,
)
"""What nearly every model keeps: the table is about faults, and not about what is learnt."""

TRAINING = TrainingConfig(preset="quick", min_steps=60, checkpoint_every_steps=10)
"""A training of a second, with checkpoints to resume from."""

PARTS = sample_parts((1_000, 300, 200, 148, 149))
_ACCOUNT = Account(who="the table of faults", why="a common state to begin with")


@dataclass(frozen=True)
class Template:
    """The model that every data set begins with."""

    model: str
    """Its address, `models:/m-…`."""
    model_run: str
    """Id of the MLflow run that made it."""
    tags: dict[str, str]
    """Of its version, without its history."""
    run: FlowRun
    """The run that trained it, whose checkpoints are left."""


def parameters(dataset: str, **more: object) -> dict[str, object]:
    """Return the parameters of a run of train/weekly that is short and promotes."""
    return {
        "dataset": dataset,
        "training": TRAINING.model_dump(exclude_unset=True),
        "promotion": POLICY.model_dump(exclude_defaults=True),
        **more,
    }


def train_template(bench: Bench, name: str = "template") -> Template:
    """Train the model on a data set of its own, by a run that nothing disturbs."""
    begin(name, PARTS)
    begun = bench.run("train/weekly", parameters(name))
    run, _ = bench.wait(begun, lambda run: bool(run.state and run.state.is_final()), 300)
    if not (run.state and run.state.name == "Promoted"):
        raise RuntimeError(f"the template was not promoted: {run.state}")
    version = MlflowClient().get_model_version_by_alias(f"{name}-cnn", "champion")
    tags = {key: text for key, text in version.tags.items() if not key.startswith("history.")}
    return Template(str(version.source), str(version.run_id), tags, run)


def begin_dataset(dataset: str, parts: Parts = PARTS) -> Snapshot:
    """Write a data set with a base that was accepted."""
    store = Store(DEFAULT_STORE)
    begin(dataset, parts)
    origin = entry_of(dataset).origin
    snapshot = write_snapshot(store, dataset, parts.train, parts.test, origin)
    write_base(store, snapshot)
    return snapshot


def drop_batch(dataset: str, name: str, digits: Digits) -> None:
    """Let a batch arrive, without a word to anybody."""
    drop(dataset, name, {"part.parquet": write_parquet(digits)})


def grow(snapshot: Snapshot, batch: Digits) -> Snapshot:
    """Let a batch have been accepted, so that what is trained now is newer than the champion."""
    store, dataset = Store(DEFAULT_STORE), snapshot.dataset
    table = image_table(batch.images, batch.labels)
    verdict = BatchVerdict(
        sequence=1,
        dataset=dataset,
        batch="before",
        accepted=True,
        reason="planted",
        digest=batch.digest(),
        arrived=datetime.now(UTC),
        files=[],
        images=len(batch),
        shards=write_shards(store, dataset, batch, table, "batch before"),
    )
    write_verdict(store, verdict)
    settle(store, verdict)
    return extend_snapshot(store, snapshot, verdict.shards, verdict.arrived, table)


def pass_validation(snapshot: Snapshot) -> None:
    """Let a snapshot have been validated, which takes its time."""
    store = Store(DEFAULT_STORE)
    report = store.put(validation_key(snapshot, "report.html"), b"<p>planted</p>")
    passed = ValidatedSnapshot(snapshot=snapshot, report=report, expectations=1, warnings=[])
    store.put(validation_key(snapshot, "passed.json"), passed.model_dump_json().encode())


def adopt(snapshot: Snapshot, template: Template, verdicts: Iterable[str]) -> list[ModelVersion]:
    """Register the template's model for a data set, once for each verdict.

    Each that is to be promoted is made champion, and what needs approval the challenger.
    """
    store, name, versions = Store(DEFAULT_STORE), snapshot.model_name, list[ModelVersion]()
    client, champion = MlflowClient(), None
    client.create_registered_model(name)
    for verdict in verdicts:
        tags = template.tags | {
            "snapshot": snapshot.digest,
            "verdict": verdict,
            "compared_with": champion.model if champion else "no champion",
        }
        version = describe(
            client.create_model_version(
                name,
                template.model,
                run_id=template.model_run,
                model_id=template.model.removeprefix("models:/"),
                tags=tags,
            )
        )
        if verdict == "promote":
            move_champion("promote", version, champion, _ACCOUNT, store)
            champion = version
        else:
            client.set_registered_model_alias(name, CHALLENGER, version.version)
        versions.append(version)
    return versions
