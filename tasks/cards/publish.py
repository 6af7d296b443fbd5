"""Publish the model card and the data card in MLflow and in Prefect."""

import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from prefect import runtime
from prefect.artifacts import create_markdown_artifact

from expectations.reference import compare_profiles
from mnist_cnn.evaluation import Evaluation
from mnist_cnn.promotion import Decision
from tasks import keys
from tasks.cards.text import PICTURES, write_card, write_data_card
from tasks.datasets.ledger import read_base
from tasks.datasets.snapshots import read_profile
from tasks.records import Candidate, ModelVersion, ValidatedSnapshot
from tasks.services.mlflow import client, page, registry_errors
from tasks.services.s3 import Store
from tasks.services.step import step


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
    run = client().get_run(candidate.run_id)
    run_page = page(f"#/experiments/{run.info.experiment_id}/runs/{candidate.run_id}")
    # MLflow sends a file itself as a download, which suits pictures; its artifact page shows text.
    pages = {name: f"{run_page}/artifacts/card/{name}.md" for name in ("model_card", "data_card")}
    raw = page(f"get-artifact?run_uuid={candidate.run_id}&path=card%2F")
    addresses = {picture: f"{raw}{picture}.png" for picture in PICTURES} | {
        "run": run_page,
        "flow run": str(runtime.flow_run.ui_url),
        "data card": pages["data_card"],
        "evaluation": f"{run_page}/artifacts/card/candidate_evaluation.json",
    }
    snapshot = validated.snapshot
    store = Store(snapshot.store)
    # A snapshot without a parent is the base itself, from which nothing can have drifted.
    base = read_base(store, snapshot.dataset) if snapshot.parent else None
    changes = compare_profiles(read_profile(base), read_profile(snapshot)) if base else []
    made = store.modified(store.name_of(snapshot.address))
    data_card = write_data_card(validated, changes, made)
    card = write_card(validated, measured, decision, version, run, addresses, datetime.now(UTC))
    with tempfile.TemporaryDirectory() as folder:
        for picture in PICTURES:
            png = store.get(keys.picture(runtime.flow_run.id, picture))
            (Path(folder) / f"{picture}.png").write_bytes(png)
        for role, evaluation in measured.items():
            content = evaluation.model_dump_json(indent=1)
            (Path(folder) / f"{role}_evaluation.json").write_text(content)
        # README.md is the Hugging Face form. The copy without metadata is for MLflow's page, which
        # would show the metadata as text.
        (Path(folder) / "dataset").mkdir()
        (Path(folder) / "README.md").write_text(card)
        (Path(folder) / "model_card.md").write_text(_without_metadata(card))
        (Path(folder) / "dataset" / "README.md").write_text(data_card)
        (Path(folder) / "data_card.md").write_text(_without_metadata(data_card))
        client().log_artifacts(candidate.run_id, folder, "card")
    create_markdown_artifact(
        _without_metadata(card), key="model-card", description=f"Model card of {version.model}"
    )
    return {"model card": pages["model_card"], "data card": pages["data_card"]}


def _without_metadata(card: str) -> str:
    """Return the card without the block of metadata at the top."""
    return card.split("\n---\n", 1)[-1].lstrip()
