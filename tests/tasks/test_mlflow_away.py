"""MLflow that is away for a while is waited for; what it refuses is not."""

import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import mlflow
import pytest
import requests
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException, RestException
from mlflow.protos.databricks_pb2 import ErrorCode
from mlflow.store.tracking.rest_store import RestStore
from prefect import flow
from urllib3.exceptions import ProtocolError

from deployments.services import Ports, inherited_environment, mlflow_server
from deployments.stack import Stack
from mnist_cnn.model import DigitCNN
from mnist_cnn.sample import embedded_sample
from mnist_cnn.training import RECIPES, TrainingConfig
from tasks.datasets.snapshots import write_snapshot
from tasks.promote import find_champion
from tasks.records import Candidate, ValidatedSnapshot
from tasks.registry import training_run
from tasks.registry.models import ModelUnusable, load_model
from tasks.registry.versions import digest_artifacts
from tasks.services.mlflow import RegistryError, RegistryUnreachable, registry_errors
from tasks.services.s3 import DEFAULT_STORE, Store
from tasks.train import train_model
from tests.flows.runs import create_run, execute, retry
from tests.tasks.versions import make_champion

NOWHERE = "http://127.0.0.1:1"
QUICK = TrainingConfig(preset="quick")


class Server:
    """An MLflow server of a test's own, to be stopped and started again with what it holds."""

    def __init__(self, stack: Stack, root: Path) -> None:
        self._service = mlflow_server(Stack(root, Ports.free()))
        self._variables = inherited_environment(stack) | self._service.settings
        self._log = (root / "mlflow.log").open("ab")
        self.address = self._service.address
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            self._service.command, env=self._variables, stdout=self._log, stderr=self._log
        )
        while True:
            try:
                httpx.get(f"{self.address}/health", trust_env=False).raise_for_status()
            except httpx.HTTPError:
                assert self._process.poll() is None
                time.sleep(0.1)
            else:
                return

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(60)

    def go_away(self, seconds: float) -> None:
        self.stop()
        threading.Timer(seconds, self.start).start()

    def close(self) -> None:
        self.stop()
        self._log.close()


@pytest.fixture
def server(stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server(stack, tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    yield server
    server.close()


@flow
def training(config: TrainingConfig, snapshot: ValidatedSnapshot) -> Candidate:
    return train_model(snapshot, config)


@pytest.fixture
def snapshot(store: Store) -> ValidatedSnapshot:
    """Return a snapshot whose model, and so experiment, has a name of its own."""
    written = write_snapshot(store, f"test-{uuid4().hex[:8]}", *embedded_sample(), "sample")
    report = f"{store.address}/report.json"
    return ValidatedSnapshot(snapshot=written, report=report, expectations=1, warnings=[])


def runs_of(snapshot: ValidatedSnapshot) -> list[Run]:
    """Return the MLflow runs of a snapshot's experiment, the newest first."""
    name = snapshot.snapshot.model_name
    return mlflow.search_runs(experiment_names=[name], output_format="list")


def http_error(status: int) -> requests.HTTPError:
    answer = requests.Response()
    answer.status_code = status
    return requests.HTTPError(f"{status}", response=answer)


@pytest.mark.parametrize(
    "error",
    [
        MlflowException(f"API request to {NOWHERE} failed with exception refused"),
        RestException({"error_code": "INTERNAL_ERROR", "message": "database is locked"}),
        RestException({"error_code": "TEMPORARILY_UNAVAILABLE"}),
        MlflowException("too many", ErrorCode.Value("REQUEST_LIMIT_EXCEEDED")),
        MlflowException("too late", ErrorCode.Value("DEADLINE_EXCEEDED")),
        MlflowException("gone", ErrorCode.Value("CANCELLED")),
        requests.ConnectionError("reset"),
        requests.Timeout("slow"),
        ProtocolError("cut short"),
        http_error(408),
        http_error(429),
        http_error(503),
    ],
)
def test_what_another_try_may_not_meet_is_away(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOWHERE)
    with (
        pytest.raises(RegistryUnreachable, match="repair the MLflow server"),
        registry_errors("a tag"),
    ):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        RestException({"error_code": "INVALID_PARAMETER_VALUE", "message": "changed params"}),
        RestException({"error_code": "PERMISSION_DENIED"}),
        RestException({"error_code": "RESOURCE_DOES_NOT_EXIST"}),
        http_error(401),
        http_error(404),
    ],
)
def test_what_any_try_will_meet_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOWHERE)
    with (
        pytest.raises(RegistryError, match="correct what MLflow refuses") as told,
        registry_errors("a tag"),
    ):
        raise error
    assert not isinstance(told.value, ConnectionError)


def test_a_password_in_the_address_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in the sentence nor in what is logged with it."""
    address = "https://anna:s3cret@host"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with pytest.raises(RegistryUnreachable) as told, registry_errors("a tag"):
        raise MlflowException(f"API request to {address}/api failed")
    assert "at https://host (API request to https://host/api failed)" in str(told.value)
    assert "s3cret" not in "".join(traceback.format_exception(told.value))


def test_a_model_is_not_called_unusable_because_mlflow_is_away(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = make_champion(f"test-{uuid4().hex[:8]}-cnn")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOWHERE)
    for use in (load_model, digest_artifacts):
        with pytest.raises(RegistryUnreachable, match=f"of {version.model} could not be read"):
            use(version.model)


def test_a_model_whose_files_are_gone_or_that_was_never_there_is_unusable(stack: Stack) -> None:
    version = make_champion(f"test-{uuid4().hex[:8]}-cnn")
    uri = MlflowClient().get_model_version_download_uri(version.name, version.version)
    files = Store(f"{DEFAULT_STORE}/mlflow")
    for name in files.names(uri.removeprefix("mlflow-artifacts:/")):
        files.remove(name)
    for address in (version.model, f"models:/{version.name}/9", "models:/nobody/1"):
        with pytest.raises(ModelUnusable, match=f"{address} does not load"):
            load_model(address)


def test_a_task_waits_until_mlflow_is_back(server: Server) -> None:
    server.go_away(seconds=3)

    @flow
    def looking() -> str:
        return f"it has {find_champion('nobody-cnn')}"

    assert looking() == "it has None"


def test_a_task_gives_up_when_its_patience_ends(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETRAINING_PATIENCE_SECONDS", "1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOWHERE)

    @flow
    def looking() -> None:
        find_champion("nobody-cnn")

    with pytest.raises(RegistryUnreachable, match="the champion of nobody-cnn could not be read"):
        looking()


def test_a_training_whose_mlflow_goes_away_at_its_end_is_finished_in_the_same_mlflow_run(
    server: Server, snapshot: ValidatedSnapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_onnx, away = training_run._log_onnx, threading.Event()

    def go_away_first(model: DigitCNN) -> None:
        if not away.is_set():
            server.go_away(seconds=3)
            away.set()
        log_onnx(model)

    monkeypatch.setattr("tasks.registry.training_run._log_onnx", go_away_first)
    candidate = training(QUICK, snapshot)
    (run,) = runs_of(snapshot)
    assert run.info.run_id == candidate.run_id
    assert run.info.status == "FINISHED"
    assert run.data.tags["outcome"]
    assert load_model(candidate.model)


def test_a_training_has_ended_only_when_every_epoch_is_in_mlflow(
    server: Server, snapshot: ValidatedSnapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_batch: Callable[..., None] = RestStore.log_batch

    def log_late(self: RestStore, *arguments: object, **named: object) -> None:
        if threading.current_thread() is not main:
            time.sleep(2)  # in the thread that sends while training goes on
        log_batch(self, *arguments, **named)

    main = threading.current_thread()
    monkeypatch.setattr(RestStore, "log_batch", log_late)
    seen: list[list[float]] = []
    set_terminated = MlflowClient.set_terminated

    def look_first(self: MlflowClient, run: str, *arguments: Any, **named: Any) -> None:
        seen.append([metric.value for metric in self.get_metric_history(run, "train_loss")])
        set_terminated(self, run, *arguments, **named)

    monkeypatch.setattr(MlflowClient, "set_terminated", look_first)
    monkeypatch.setattr(
        "tasks.registry.training_run._log_onnx", lambda _model: None
    )  # they take their time
    monkeypatch.setattr("tasks.registry.training_run._log_exported", lambda _model: "models:/none")
    candidate = training(QUICK, snapshot)
    epochs = MlflowClient().get_metric_history(candidate.run_id, "train_loss")
    assert [len(losses) for losses in seen] == [len(epochs)]
    assert epochs


def test_a_training_that_is_resumed_after_an_upgrade_gets_another_mlflow_run(
    stack: Stack, snapshot: ValidatedSnapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainingConfig(preset="quick", checkpoint_every_steps=20)
    given = {"config": config.model_dump(), "snapshot": snapshot.model_dump(mode="json")}
    run = create_run(training, **given)
    with monkeypatch.context() as fault:
        fault.setattr("tasks.registry.training_run._log_onnx", lambda *_: 1 / 0)
        assert execute(training, run).is_failed()
    upgraded = RECIPES["quick"].model_copy(update={"label_smoothing": 0.05})
    monkeypatch.setitem(RECIPES, "quick", upgraded)
    state = retry(training, run)
    assert state.is_completed(), state.message
    new, old = runs_of(snapshot)
    assert (old.info.status, new.info.status) == ("KILLED", "FINISHED")
    assert "it had another label_smoothing than before" in old.data.tags["superseded"]
    assert [found.data.params["label_smoothing"] for found in (old, new)] == ["0.1", "0.05"]
    assert "resumed_from_step" not in new.data.metrics, "its checkpoints are of another recipe"
    assert {found.data.tags["prefect.flow_run_id"] for found in (old, new)} == {str(run)}
    assert state.result().run_id == new.info.run_id
    assert retry(training, run).result() == state.result()
