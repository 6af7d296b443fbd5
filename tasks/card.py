"""Write the model card and the data card in the Hugging Face form."""

import json
import tempfile
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData
from prefect import runtime, task
from prefect.artifacts import create_markdown_artifact

from mnist_cnn.card import (
    DATA_TEMPLATE,
    MODEL_TEMPLATE,
    PICTURES,
    CardFacts,
    CheckFact,
    DataFacts,
    DataPart,
    EnergyFacts,
    HardwareFacts,
    Pictures,
    TrainingFacts,
    describe,
    describe_data,
)
from mnist_cnn.evaluation import Evaluation
from mnist_cnn.promotion import Decision
from mnist_cnn.recipe import PROCEDURE
from tasks.records import SPLITS, Candidate, ModelVersion, ValidatedSnapshot
from tasks.storage import Store, worth_another_try

if TYPE_CHECKING:
    from mlflow.entities import Run

_REPOSITORY = "https://github.com/mlops-2425q1-mds-upc/MLOps-mdsist"
_DEVELOPERS = [
    "Adrià Aumatell",
    "Pol Arevalo",
    "Ignasi Cervero",
    "Zhengyong Ji",
    "Rubén Villanueva",
]
_SOFTWARE = ["torch", "torchvision", "numpy", "scikit-learn", "mlflow", "prefect"]
_SOURCES = {
    # Licence and name on the Hugging Face Hub, or of the archive where it is not there.
    "mnist": ("cc-by-sa-3.0", "ylecun/mnist"),
    "digits": ("cc-by-4.0", "uci/optical-recognition-of-handwritten-digits"),
}


def write_card(facts: CardFacts) -> str:
    """Return the model card as Markdown with its metadata block in the model-index form."""
    metadata = ModelCardData(
        license="apache-2.0",
        library_name="pytorch",
        pipeline_tag="image-classification",
        tags=["mnist", "digits", "image-classification"],
        datasets=[facts.data.hub_id],
        metrics=["accuracy", "f1", "brier_score"],
        model_name=f"{facts.name} version {facts.version}",
        eval_results=_results(facts),
    )
    card = ModelCard.from_template(
        metadata, template_path=str(MODEL_TEMPLATE), facts=facts, text=describe(facts)
    )
    return f"{card}\n"


def _results(facts: CardFacts) -> list[EvalResult]:
    evaluation = facts.candidate
    metrics = [
        ("accuracy", "Accuracy", evaluation.accuracy),
        ("f1", "Macro F1", evaluation.macro_f1),
        ("brier_score", "Brier score", evaluation.calibration.brier),
        ("loss", "Cross entropy, nats", evaluation.loss),
        ("ece", "Expected calibration error", evaluation.calibration.expected_error),
    ]
    metrics += [
        ("accuracy", f"Accuracy, {c.corruption} at {c.strength:g} {c.unit}", c.accuracy)
        for c in evaluation.conditions
        if c.accuracy is not None
    ]
    return [
        EvalResult(
            task_type="image-classification",
            task_name="Image Classification",
            dataset_type=facts.data.hub_id,
            dataset_name=facts.data.name,
            dataset_split="test",
            dataset_revision=facts.data.digest,
            metric_type=kind,
            metric_name=name,
            metric_value=value,
            source_name=f"MLflow run {facts.run_id}",
            source_url=facts.run_url,
        )
        for kind, name, value in metrics
    ]


def write_data_card(data: DataFacts) -> str:
    """Return the data card of a snapshot as Markdown with its metadata block."""
    metadata = DatasetCardData(
        license=data.licence,
        task_categories=["image-classification"],
        pretty_name=data.name,
        tags=["digits", "handwriting"],
    )
    card = DatasetCard.from_template(
        metadata, template_path=str(DATA_TEMPLATE), data=data, text=describe_data(data)
    )
    return f"{card}\n"


@task(retries=2, retry_delay_seconds=[2, 10], retry_condition_fn=worth_another_try)
def publish_cards(
    validated: ValidatedSnapshot,
    candidate: Candidate,
    measured: Mapping[str, Evaluation],
    decision: Decision,
    version: ModelVersion,
) -> dict[str, str]:
    """Write model card and data card as artifacts of the MLflow run; return links to them.

    The pictures that `evaluate_models` drew go beside the cards. The model card is also shown in
    Prefect, and the version's description links it.
    """
    import mlflow  # noqa: PLC0415 - 2 s to import
    from mlflow import MlflowClient  # noqa: PLC0415

    client = MlflowClient()
    server = mlflow.get_tracking_uri().rstrip("/")
    run = client.get_run(candidate.run_id)

    def link(name: str) -> str:
        return f"{server}/get-artifact?path=card%2F{name}&run_uuid={candidate.run_id}"

    store = Store(validated.snapshot.store)
    data = _data_facts(validated, store)
    facts = _card_facts(validated, candidate, measured, decision, version, run, data, link)
    card = write_card(facts)
    with tempfile.TemporaryDirectory() as folder:
        for picture in PICTURES:
            content = store.get(f"runs/{runtime.flow_run.id}/pictures/{picture}.png")
            (Path(folder) / f"{picture}.png").write_bytes(content)
        # The Hugging Face form, and the same for MLflow's page, which shows metadata as text.
        (Path(folder) / "README.md").write_text(card)
        (Path(folder) / "model_card.md").write_text(_without_metadata(card))
        (Path(folder) / "data_card.md").write_text(write_data_card(data))
        client.log_artifacts(candidate.run_id, folder, "card")
    registered = client.get_model_version(version.name, version.version)
    page = (
        f"{server}/#/experiments/{run.info.experiment_id}/runs/{candidate.run_id}"
        "/artifacts/card/model_card.md"
    )
    if page not in (registered.description or ""):
        client.update_model_version(
            version.name,
            version.version,
            f"{registered.description or ''}\n\n[Model card]({page})".strip(),
        )
    create_markdown_artifact(
        _without_metadata(card), key="model-card", description=f"Model card of {version.model}"
    )
    return {"model card": page, "data card": link("data_card.md")}


def _without_metadata(card: str) -> str:
    """Cut the block of metadata at the top."""
    return card.split("\n---\n", 1)[-1].lstrip()


def _card_facts(
    validated: ValidatedSnapshot,
    candidate: Candidate,
    measured: Mapping[str, Evaluation],
    decision: Decision,
    version: ModelVersion,
    run: "Run",
    data: DataFacts,
    link: Callable[[str], str],
) -> CardFacts:
    metrics, tags, params = run.data.metrics, run.data.tags, run.data.params
    machine = json.loads(tags["machine"])
    images = validated.snapshot.images("train")
    return CardFacts(
        name=version.name,
        version=version.version,
        model_uri=version.model,
        champion_uri=f"models:/{version.name}@champion",
        created=datetime.now(UTC),
        developers=_DEVELOPERS,
        contact=_REPOSITORY + "/issues",
        repository=_REPOSITORY,
        run_id=candidate.run_id,
        run_url=f"{link('').split('/get-artifact')[0]}/#/experiments/{run.info.experiment_id}"
        f"/runs/{candidate.run_id}",
        flow_run_url=str(runtime.flow_run.ui_url),
        data_card=link("data_card.md"),
        pictures=Pictures(**{picture: link(f"{picture}.png") for picture in PICTURES}),
        architecture=tags["architecture"],
        training=TrainingFacts(
            # MLflow keeps parameters as text.
            settings={name: None if value == "None" else value for name, value in params.items()},
            procedure=PROCEDURE,
            precision=tags["precision"],
            device=tags["device"],
            started=datetime.fromtimestamp(run.info.start_time / 1000, UTC),
            seconds=metrics["training_seconds"],
            images=images,
            images_per_second=metrics["steps"]
            * float(params["batch_size"])
            / metrics["training_seconds"],
        ),
        hardware=HardwareFacts(
            processor=machine["processor"],
            cores=machine["cores"],
            memory_gib=machine["memory_gib"],
            accelerator=machine.get("accelerator") or None,
        ),
        software={name: installed(name) for name in _SOFTWARE} | {"Python": machine["python"]},
        energy=EnergyFacts(
            kwh=metrics["energy_kwh"],
            grams_co2e=metrics["emissions_g_co2e"],
            hours=metrics["training_seconds"] / 3600,
            provider=machine["cloud_provider"] or "none (own machine)",
            region=machine["region"],
            tool=f"codecarbon {machine['codecarbon']}",
            method=machine["method"],
        )
        if "energy_kwh" in metrics
        else None,
        data=data,
        candidate=measured["candidate"],
        champion=measured.get("champion"),
        previous=measured.get("previous"),
        verdict=decision.verdict,
        reason=decision.reason,
        checks=[
            CheckFact(name=check.name, passed=check.passed, sentence=check.sentence)
            for check in decision.checks
        ],
    )


def _data_facts(validated: ValidatedSnapshot, store: Store) -> DataFacts:
    snapshot = validated.snapshot
    parts = [
        DataPart(
            name=f"{split} {number}",
            split=split,
            images=shard.images,
            source=shard.origin,
            digest=shard.digest,
        )
        for split in SPLITS
        for number, shard in enumerate(snapshot.shards(split), 1)
    ]
    # Of a data set of one's own nobody here knows the licence.
    licence, hub = _SOURCES.get(snapshot.dataset, ("other", snapshot.dataset))
    return DataFacts(
        name=snapshot.dataset,
        digest=snapshot.digest,
        address=snapshot.address,
        created=store.modified(store.name_of(snapshot.address)),
        parent=snapshot.parent,
        parts=parts,
        training_labels=snapshot.labels("train"),
        test_labels=snapshot.labels("test"),
        validation_verdict="accepted",
        validation_address=validated.report,
        expectations_met=validated.expectations - len(validated.warnings),
        expectations=validated.expectations,
        drift=[],
        licence=licence,
        hub_id=hub,
    )
