from uuid import uuid4

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from deployments.stack import Stack
from mnist_cnn.promotion import Decision
from tasks.records import Candidate, ModelVersion
from tasks.registry import (
    ChampionChanged,
    RegistryError,
    find_champion,
    register_candidate,
    set_champion,
)


@pytest.fixture
def candidate(stack: Stack) -> Candidate:
    """Return a run with something registrable in it; the registry does not look inside."""
    name = f"test-{uuid4().hex[:8]}-cnn"
    mlflow.set_tracking_uri(stack.mlflow_url)
    mlflow.set_experiment(name)
    with mlflow.start_run() as run:
        model = mlflow.initialize_logged_model(name="model")
        model = mlflow.finalize_logged_model(model.model_id, "READY")
    return Candidate(
        name=name, run_id=run.info.run_id, model=f"models:/{model.model_id}", snapshot="abc"
    )


def decision(candidate: Candidate, verdict: str = "keep") -> Decision:
    return Decision(
        verdict=verdict,
        reason="accuracy floor: 0.9000 is below 0.9800",
        checks=[],
        candidate=candidate.model,
        champion=None,
        snapshot=candidate.snapshot,
        comparisons=[],
        test_split="def",
        decisions=1,
        level=0.025,
    )


def register(candidate: Candidate, verdict: str = "keep") -> ModelVersion:
    return register_candidate.fn(candidate, decision(candidate, verdict), "s3://b/decision.json")


def test_an_unknown_model_has_no_champion(stack: Stack) -> None:
    assert find_champion.fn("never-registered") is None


def test_a_model_without_the_alias_has_no_champion(candidate: Candidate) -> None:
    register(candidate)
    assert find_champion.fn(candidate.name) is None


def test_a_registry_that_cannot_be_read_is_not_an_empty_one(
    candidate: Candidate,
) -> None:
    mlflow.set_tracking_uri("http://127.0.0.1:1")
    with pytest.raises(RegistryError, match=r"could not be read .* nothing is promoted"):
        find_champion.fn(candidate.name)


def test_a_broken_answer_is_not_an_empty_registry(
    candidate: Candidate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise MlflowException("INTERNAL_ERROR: database is locked")

    monkeypatch.setattr(MlflowClient, "get_registered_model", broken)
    with pytest.raises(RegistryError, match="database is locked"):
        find_champion.fn(candidate.name)


def test_a_rejected_candidate_is_registered_with_its_reason(candidate: Candidate) -> None:
    version = register(candidate)
    registered = MlflowClient().get_model_version(version.name, version.version)
    assert registered.tags["verdict"] == "keep"
    assert registered.tags["reason"] == "accuracy floor: 0.9000 is below 0.9800"
    assert registered.tags["snapshot"] == "abc"
    assert registered.tags["decision_record"] == "s3://b/decision.json"
    assert registered.description.startswith("keep: ")


def test_registering_twice_makes_one_version(candidate: Candidate) -> None:
    assert register(candidate) == register(candidate)
    found = MlflowClient().search_model_versions(f"name = '{candidate.name}'")
    assert len(found) == 1


def test_the_alias_moves_and_a_repeat_changes_nothing(candidate: Candidate) -> None:
    version = register(candidate, "promote")
    set_champion.fn(version, replaces=None)
    set_champion.fn(version, replaces=None)
    assert find_champion.fn(candidate.name) == version


def test_a_champion_that_changed_meanwhile_is_not_overwritten(candidate: Candidate) -> None:
    version = register(candidate, "promote")
    set_champion.fn(version, replaces=None)
    late = version.model_copy(update={"version": "2", "model": f"models:/{version.name}/2"})
    with pytest.raises(ChampionChanged, match="was compared with none; nothing was promoted"):
        set_champion.fn(late, replaces=None)
    assert find_champion.fn(candidate.name) == version
