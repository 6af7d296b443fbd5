"""Write the model card and the data card in the Hugging Face form."""

import json
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData
from prefect import runtime
from prefect.artifacts import create_markdown_artifact

from expectations.reference import WORTH_A_LOOK, compare_profiles
from mnist_cnn.evaluation import Evaluation
from mnist_cnn.promotion import Decision
from mnist_cnn.training import PROCEDURE
from tasks.cards.text import (
    DATA_TEMPLATE,
    MODEL_TEMPLATE,
    PICTURES,
    CardFacts,
    CheckFact,
    DataFacts,
    DataPart,
    DriftFigure,
    EnergyFacts,
    HardwareFacts,
    Pictures,
    TrainingFacts,
    describe,
    describe_data,
)
from tasks.datasets.ledger import read_base
from tasks.datasets.snapshots import read_profile
from tasks.records import SPLITS, Candidate, ModelVersion, ValidatedSnapshot
from tasks.registry.versions import registry_errors
from tasks.services.addresses import without_credentials
from tasks.services.s3 import Store
from tasks.services.step import step

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
_MNIST_WRITERS = (
    "MNIST's writers were employees of the US Census Bureau and US high school students (LeCun, "
    "Cortes and Burges 1998, http://yann.lecun.com/exdb/mnist/): a crossed 7 or a 1 with a long "
    "upstroke, as people elsewhere write them, is rare."
)
_SAMPLE_WRITERS = (
    "The sample's digits are by 13 people (Alpaydin and Kaynak 1998, "
    "https://doi.org/10.24432/C50P49), of whom each may be in both splits."
)
_OWN_WRITERS = "Who wrote the digits is known to those who brought the data set."
_SOURCES = {
    # Licence; name on the Hugging Face Hub, or in the archive where the Hub has none; writers.
    "mnist": ("cc-by-sa-3.0", "ylecun/mnist", _MNIST_WRITERS),
    "digits": ("cc-by-4.0", "uci/optical-recognition-of-handwritten-digits", _SAMPLE_WRITERS),
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
    """Return the entries of the model index, clean figures first, then every condition."""
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


@step
@registry_errors("the cards in the MLflow run")
def publish_cards(
    validated: ValidatedSnapshot,
    candidate: Candidate,
    measured: Mapping[str, Evaluation],
    decision: Decision,
    version: ModelVersion,
) -> dict[str, str]:
    """Write model card and data card as artifacts of the MLflow run; return links to them.

    The pictures that `evaluate_models` stored and the evaluations go beside the cards. The model
    card becomes an artifact in Prefect as well.
    """
    import mlflow
    from mlflow import MlflowClient

    client = MlflowClient()
    server = without_credentials(mlflow.get_tracking_uri()).rstrip("/")
    run = client.get_run(candidate.run_id)
    run_page = f"{server}/#/experiments/{run.info.experiment_id}/runs/{candidate.run_id}"
    # MLflow sends a file itself as a download, which suits pictures; its artifact page shows text.
    pages = {name: f"{run_page}/artifacts/card/{name}.md" for name in ("model_card", "data_card")}
    raw = f"{server}/get-artifact?run_uuid={candidate.run_id}&path=card%2F"
    addresses = {picture: f"{raw}{picture}.png" for picture in PICTURES} | {
        "run_page": run_page,
        "data_card": pages["data_card"],
        "evaluation": f"{run_page}/artifacts/card/candidate_evaluation.json",
    }
    store = Store(validated.snapshot.store)
    data = _data_facts(validated, store)
    facts = _card_facts(validated, candidate, measured, decision, version, run, data, addresses)
    card = write_card(facts)
    with tempfile.TemporaryDirectory() as folder:
        for picture in PICTURES:
            png = store.get(f"runs/{runtime.flow_run.id}/pictures/{picture}.png")
            (Path(folder) / f"{picture}.png").write_bytes(png)
        for role, evaluation in measured.items():
            content = evaluation.model_dump_json(indent=1)
            (Path(folder) / f"{role}_evaluation.json").write_text(content)
        # README.md is the Hugging Face form. The copy without metadata is for MLflow's page, which
        # would show the metadata as text.
        data_card = write_data_card(data)
        (Path(folder) / "dataset").mkdir()
        (Path(folder) / "README.md").write_text(card)
        (Path(folder) / "model_card.md").write_text(_without_metadata(card))
        (Path(folder) / "dataset" / "README.md").write_text(data_card)
        (Path(folder) / "data_card.md").write_text(_without_metadata(data_card))
        client.log_artifacts(candidate.run_id, folder, "card")
    create_markdown_artifact(
        _without_metadata(card), key="model-card", description=f"Model card of {version.model}"
    )
    return {"model card": pages["model_card"], "data card": pages["data_card"]}


def _without_metadata(card: str) -> str:
    """Return the card without the block of metadata at the top."""
    return card.split("\n---\n", 1)[-1].lstrip()


def _card_facts(
    validated: ValidatedSnapshot,
    candidate: Candidate,
    measured: Mapping[str, Evaluation],
    decision: Decision,
    version: ModelVersion,
    run: "Run",
    data: DataFacts,
    addresses: Mapping[str, str],
) -> CardFacts:
    metrics = run.data.metrics
    tags = run.data.tags
    params = run.data.params
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
        run_url=addresses["run_page"],
        flow_run_url=str(runtime.flow_run.ui_url),
        data_card=addresses["data_card"],
        evaluation=addresses["evaluation"],
        pictures=Pictures(**{picture: addresses[picture] for picture in PICTURES}),
        architecture=tags["architecture"],
        training=TrainingFacts(
            # MLflow stores parameters as text, so that None reads "None".
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
        # codecarbon may have measured nothing; the card then states a gap.
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
    licence, hub, writers = _SOURCES.get(
        snapshot.dataset, ("other", snapshot.dataset, _OWN_WRITERS)
    )
    # A snapshot without a parent is the base itself, from which nothing can have drifted.
    base = read_base(store, snapshot.dataset) if snapshot.parent else None
    changes = compare_profiles(read_profile(base), read_profile(snapshot)) if base else []
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
        drift=[
            DriftFigure(
                name=change.feature.replace("_", " "),
                value=change.stability_index,
                limit=WORTH_A_LOOK,
                passed=change.stability_index <= WORTH_A_LOOK,
            )
            for change in changes
            if change.stability_index is not None
        ],
        licence=licence,
        hub_id=hub,
        writers=writers,
    )
