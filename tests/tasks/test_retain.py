from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient

from deployments.stack import Stack
from flows.retain import retain
from tasks.registry.history import Move
from tasks.retain import RetentionPolicy, Version, choose_removals
from tasks.services.s3 import Store

NOW = datetime(2026, 11, 2, tzinfo=UTC)
POLICY = RetentionPolicy(checkpoint_days=14, rejected_days=90)


def version(
    number: str = "1", verdict: str | None = "keep", days: int = 100, **other: Any
) -> Version:
    tags = {"verdict": verdict} if verdict else {}
    facts: dict[str, Any] = {
        "name": "digits-cnn",
        "number": number,
        "source": f"models:/m-{number}",
        "created": NOW - timedelta(days=days),
        "aliased": False,
        "tags": tags | other.pop("tags", {}),
    }
    return Version(**facts | other)


def move(action: str) -> dict[str, str]:
    made = Move(
        sequence=1,
        action=action,
        model="digits-cnn",
        from_version=None,
        to_version="1",
        who="Ada",
        why="reasons",
        when=NOW,
        run="run",
        run_url="http://127.0.0.1/run",
        follows=None,
    )
    return {made.tag: made.content}


def chosen(*versions: Version) -> list[str]:
    return [removal.what for removal in choose_removals({}, versions, POLICY, NOW)]


@pytest.mark.parametrize("verdict", ["keep", "needs-approval"])
def test_artifacts_of_an_old_version_that_lost_go(verdict: str) -> None:
    assert chosen(version(verdict=verdict)) == ["digits-cnn/1"]
    assert chosen(version(verdict=verdict, tags=move("reject"))) == ["digits-cnn/1"]


@pytest.mark.parametrize(
    "needed",
    [
        version(aliased=True),
        version(days=89),
        version(verdict="promote"),
        version(verdict=None),
        version(verdict="needs-approval", tags=move("approve")),
        version(tags=move("roll back")),
        version(tags={"artifacts_removed": "2026-10-01"}),
    ],
    ids=["alias", "young", "promoted", "never judged", "approved", "rolled back to", "gone"],
)
def test_a_version_that_is_needed_or_young_or_gone_is_left_alone(needed: Version) -> None:
    assert chosen(needed) == []


def test_artifacts_that_a_needed_version_shares_stay() -> None:
    shared = version("2", aliased=True, source="models:/m-1")
    assert chosen(version("1"), shared) == []


def test_what_a_run_left_goes_only_some_days_after_its_end() -> None:
    ended = {
        "runs/a/checkpoints/": NOW - timedelta(days=15),
        "runs/b/checkpoints/": NOW - timedelta(days=13),
    }
    removals = choose_removals(ended, [], POLICY, NOW)
    assert [removal.what for removal in removals] == ["runs/a/checkpoints/"]


@pytest.fixture
def long_ago(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the flow believe that a year has passed."""

    class Later(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return NOW.now(tz) + timedelta(days=365)

    monkeypatch.setattr("tasks.retain.datetime", Later)


def make_version(name: str, verdict: str) -> str:
    """Register a version with a file, and return the prefix of its artifacts in the bucket."""
    mlflow.set_experiment(name)
    with mlflow.start_run():
        model = mlflow.initialize_logged_model(name="model")
        MlflowClient().log_model_artifact(model.model_id, __file__)
        model = mlflow.finalize_logged_model(model.model_id, "READY")
    made = mlflow.register_model(model.model_uri, name, tags={"verdict": verdict})
    uri = MlflowClient().get_model_version_download_uri(name, made.version)
    return uri.removeprefix("mlflow-artifacts:/")


def kept(store: Store) -> list[str]:
    """Name what lies in a store, but for the outcomes that the flow itself records."""
    return [name for name in store.names("") if not name.endswith("/outcome.json")]


@pytest.fixture
def marked_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let folders be marked by an empty object, as some tools do; the local S3 server refuses."""
    names = Store.names
    monkeypatch.setattr(
        Store,
        "names",
        lambda self, prefix: [
            *([prefix] if prefix in {"runs/", "gate-check/"} else []),
            *names(self, prefix),
        ],
    )


def test_the_flow_removes_what_it_listed_and_nothing_that_is_needed(
    stack: Stack, store: Store, long_ago: None, marked_folders: None
) -> None:
    name = f"retained-{stack.ports.mlflow}-cnn-{datetime.now(UTC):%H%M%S}"
    lost, champion = (make_version(name, verdict) for verdict in ("keep", "keep"))
    MlflowClient().set_registered_model_alias(name, "champion", "2")
    state = retain(store=store.address, return_state=True)  # a run that has ended
    run = state.state_details.flow_run_id
    store.put("datasets/digits/snapshots/abc.json", b"{}")
    store.put(f"runs/{run}/summary.json", b"{}")
    store.put(f"runs/{run}/checkpoints/1.pt", b"weights")
    store.put("runs/never-heard-of/checkpoints/1.pt", b"another server's")
    before = kept(store)
    models = Store("s3://mnist-retraining/mlflow")

    dry = retain(store=store.address, return_state=True)
    assert dry.name == "Nothing removed, dry run"
    assert {f"{name}/1", f"runs/{run}/checkpoints/"} <= set(str(dry.message).split("; "))
    assert f"{name}/2" not in str(dry.message)
    assert kept(store) == before
    assert models.names(lost)

    real = retain(store=store.address, dry_run=False, return_state=True)
    assert real.name == "Removed"
    assert real.message == dry.message
    assert set(before) - set(kept(store)) == {f"runs/{run}/checkpoints/1.pt"}
    assert models.names(lost) == []
    assert models.names(champion)
    again = retain(store=store.address, dry_run=False, return_state=True)
    assert (again.name, again.message) == ("Nothing to remove", "nothing is old enough")
