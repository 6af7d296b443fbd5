"""A run that is killed in the middle of training goes on from there, in the same MLflow run."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from uuid import UUID

import mlflow
import psutil
import pytest
import torch
from mlflow import MlflowClient
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun

from deployments.stack import PROJECT, Stack
from mnist_cnn.digits import embedded_sample
from mnist_cnn.training import TrainingConfig, train
from tasks.storage import DEFAULT_STORE, Store

STEPS = 600
THREADS = torch.get_num_threads()
"""What torch chooses by itself; read before any fixture changes it."""

SECONDS_UNTIL_ALL_IS_REPORTED = 10

CONFIG = TrainingConfig(min_steps=STEPS, batch_size=64, checkpoint_every_steps=50, seed=11)


def prefect(*words: str) -> str:
    command = [sys.executable, "-m", "prefect", *words]
    typed = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert typed.returncode == 0, typed.stdout + typed.stderr
    return typed.stdout


def wait_for(run_id: UUID, is_there: Callable[[FlowRun], bool], seconds: float = 180) -> FlowRun:
    deadline = time.monotonic() + seconds
    with get_client(sync_client=True) as client:
        while time.monotonic() < deadline:
            run = client.read_flow_run(run_id)
            if is_there(run):
                return run
            time.sleep(0.1)
    pytest.fail(f"{run_id} is {run.state} after {seconds} s")


def steps_kept(run_id: UUID) -> list[int]:
    names = Store(DEFAULT_STORE).names(f"runs/{run_id}/checkpoints/")
    return [int(name.rsplit("-", 1)[1].split(".")[0]) for name in names]


def process_of(run_id: UUID) -> psutil.Process:
    """Find the process that executes the flow: the youngest that carries the run's id."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("PREFECT__FLOW_RUN_ID") == str(run_id):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return max(found, key=psutil.Process.create_time)


def _age(run: FlowRun) -> float:
    """Return for how many seconds a run has been in its state."""
    assert run.state
    return (datetime.now(UTC) - run.state.timestamp).total_seconds()


def begin_and_signal(number: int) -> tuple[UUID, int]:
    """Start a long training, send a signal once it has kept checkpoints; return run and step."""
    out = prefect(
        "deployment", "run", "train/weekly", "--param", "dataset=digits", "--param", "force=true",
        "--param", f"training={CONFIG.model_dump_json(exclude_unset=True)}",
    )  # fmt: skip
    (word,) = re.findall(r"UUID: (\S+)", out)
    run_id = UUID(word)
    wait_for(run_id, lambda _: bool(steps_kept(run_id)))
    process = process_of(run_id)
    process.send_signal(number)
    process.wait(60)
    wait_for(run_id, lambda run: bool(run.state and run.state.is_crashed()))
    # The worker reports the death too, and would report it over a retry.
    wait_for(run_id, lambda run: bool(run.state and _age(run) > SECONDS_UNTIL_ALL_IS_REPORTED))
    return run_id, max(steps_kept(run_id))


def retry(run_id: UUID) -> FlowRun:
    prefect("flow-run", "retry", str(run_id))
    wait_for(run_id, lambda run: bool(run.state and not run.state.is_final()))
    run = wait_for(run_id, lambda run: bool(run.state and run.state.is_final()))
    assert run.state
    assert run.state.is_completed(), run.state.message
    return run


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, torch.Tensor]:
    """Train here with as many threads as the flow's process takes: their number rounds sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    weights = train(embedded_sample()[0], CONFIG).model.folded().state_dict()
    torch.set_num_threads(before)
    return weights


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_a_killed_run_goes_on_and_ends_with_the_weights_of_an_uninterrupted_one(
    stack: Stack, uninterrupted: dict[str, torch.Tensor], number: int
) -> None:
    run_id, step = begin_and_signal(number)
    assert step < STEPS
    if number == signal.SIGTERM:
        assert step % CONFIG.checkpoint_every_steps, "there is no checkpoint of the last moment"
    retry(run_id)
    (run,) = mlflow.search_runs(
        experiment_names=["digits-cnn"],
        filter_string=f"tags.`prefect.flow_run_id` = '{run_id}'",
        output_format="list",
    )
    assert float(run.data.metrics["resumed_from_step"]) == step
    steps = [m.step for m in MlflowClient().get_metric_history(run.info.run_id, "train_loss")]
    assert len(steps) == len(set(steps))
    assert max(steps) == STEPS
    model = mlflow.pytorch.load_model(f"models:/{run.outputs.model_outputs[0].model_id}")
    kept = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, expected in uninterrupted.items():
        if name in kept:
            assert torch.equal(kept[name], expected), name
    assert len(kept.keys() & uninterrupted.keys()) >= len(kept)
