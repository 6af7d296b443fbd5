"""Versions in a real registry that were judged as a test wants, with nothing trained for them."""

import tempfile
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient

from mnist_cnn.evaluation import Evaluation
from mnist_cnn.promotion import Decision
from tasks.promote import register_candidate, set_challenger, set_champion
from tasks.records import Candidate, ModelVersion
from tasks.services.s3 import DEFAULT_STORE


def make_candidate(name: str, content: str = "weights") -> Candidate:
    """Return a run with something registrable in it; the registry does not look inside."""
    mlflow.set_experiment(name)
    with mlflow.start_run() as run, tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "weights").write_text(content)
        model = mlflow.initialize_logged_model(name="model")
        MlflowClient().log_model_artifacts(model.model_id, folder)
        model = mlflow.finalize_logged_model(model.model_id, "READY")
    return Candidate(
        name=name, run_id=run.info.run_id, model=f"models:/{model.model_id}", snapshot="abc"
    )


def decision(candidate: Candidate, verdict: str, champion: ModelVersion | None) -> Decision:
    return Decision(
        verdict=verdict,
        reason="accuracy floor: 0.9000 is below 0.9800",
        checks=[],
        candidate=candidate.model,
        champion=champion.model if champion else None,
        snapshot=candidate.snapshot,
        comparisons=[],
        test_split="def",
        decisions=1,
        level=0.025,
    )


def register(
    candidate: Candidate, verdict: str = "keep", champion: ModelVersion | None = None
) -> ModelVersion:
    known: dict[str, Any] = {"accuracy": 0.99, "outcomes": "s3://b/outcomes.npz"}
    measured = Evaluation.model_construct(**known)
    record = f"s3://b/{champion.version if champion else 0}.json"
    return register_candidate.fn(
        candidate, measured, decision(candidate, verdict, champion), record
    )


def make_champion(name: str, replaces: ModelVersion | None = None) -> ModelVersion:
    version = register(make_candidate(name), "promote", replaces)
    assert set_champion.fn(version, replaces, "it is proved to be better", DEFAULT_STORE)
    return version


def make_challenger(name: str, champion: ModelVersion) -> ModelVersion:
    version = register(make_candidate(name), "needs-approval", champion)
    set_challenger.fn(version)
    return version
