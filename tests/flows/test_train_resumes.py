"""A run that dies in training goes on from there by itself, in the same MLflow run.

Nobody types a retry here.
"""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from uuid import UUID

import mlflow
import psutil
import pytest
import torch
from mlflow import MlflowClient
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import Crashed

from deployments.stack import PROJECT, Stack
from mnist_cnn.sample import embedded_sample
from mnist_cnn.training import TrainingConfig, train
from tasks.services.s3 import DEFAULT_STORE, Store

STEPS = 600
THREADS = torch.get_num_threads()
"""What torch chooses by itself; read before any fixture changes it."""

CONFIG = TrainingConfig(min_steps=STEPS, batch_size=64, checkpoint_every_steps=50, seed=11)


def prefect(*words: str) -> str:
    command = [sys.executable, "-m", "prefect", *words]
    typed = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert typed.returncode == 0, typed.stdout + typed.stderr
    return typed.stdout


def wait_for(run_id: UUID, is_there: Callable[[FlowRun], bool], seconds: float = 240) -> FlowRun:
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


def begin(config: TrainingConfig, *params: str) -> UUID:
    """Start a training and return its run once it has kept a checkpoint."""
    given = [f"training={config.model_dump_json(exclude_unset=True)}", "force=true", *params]
    words = [word for param in ["dataset=digits", *given] for word in ("--param", param)]
    (word,) = re.findall(r"UUID: (\S+)", prefect("deployment", "run", "train/weekly", *words))
    run_id = UUID(word)
    wait_for(run_id, lambda _: bool(steps_kept(run_id)))
    return run_id


def final(run: FlowRun) -> bool:
    return bool(run.state and run.state.is_final())


def states_of(run_id: UUID) -> list[State]:
    with get_client(sync_client=True) as client:
        return sorted(client.read_flow_run_states(run_id), key=lambda state: state.timestamp)


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, torch.Tensor]:
    """Train here with as many threads as the flow's process takes: their number rounds sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    weights = train(embedded_sample()[0], CONFIG).model.folded().state_dict()
    torch.set_num_threads(before)
    return weights


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_a_killed_run_goes_on_by_itself_and_ends_with_the_weights_of_an_uninterrupted_one(
    stack: Stack,
    uninterrupted: dict[str, torch.Tensor],
    number: int,
    record_property: Callable[[str, object], None],
) -> None:
    run_id = begin(CONFIG)
    process = process_of(run_id)
    process.send_signal(number)
    process.wait(60)
    died, step = time.monotonic(), max(steps_kept(run_id))
    assert step < STEPS
    if number == signal.SIGTERM:
        assert step % CONFIG.checkpoint_every_steps, "there is no checkpoint of the last moment"
    wait_for(run_id, lambda _: max(steps_kept(run_id)) > step)
    record_property("seconds from the kill to training again", time.monotonic() - died)
    wait_for(run_id, lambda run: bool(run.state and run.state.is_completed()))
    names = [state.name for state in states_of(run_id)]
    assert names.count("AwaitingRetry") == 1, names
    (run,) = mlflow.search_runs(
        experiment_names=["digits-cnn"],
        filter_string=f"tags.`prefect.flow_run_id` = '{run_id}'",
        output_format="list",
    )
    assert float(run.data.metrics["resumed_from_step"]) == step
    steps = [m.step for m in MlflowClient().get_metric_history(run.info.run_id, "train_loss")]
    assert len(steps) == len(set(steps))
    assert max(steps) == STEPS
    assert run.outputs
    model = mlflow.pytorch.load_model(f"models:/{run.outputs.model_outputs[0].model_id}")
    kept = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, expected in uninterrupted.items():
        if name in kept:
            assert torch.equal(kept[name], expected), name
    assert len(kept.keys() & uninterrupted.keys()) >= len(kept)


LONG = CONFIG.model_copy(update={"min_steps": 8_000})


def test_a_run_that_a_person_cancels_in_training_ends_cancelled_and_stays_so(stack: Stack) -> None:
    run_id = begin(LONG)
    prefect("flow-run", "cancel", str(run_id))
    process = process_of(run_id)
    process.wait(90)
    wait_for(run_id, lambda run: bool(run.state and run.state.is_cancelled()))
    time.sleep(30)  # the reports of the death come, and what they set off
    assert wait_for(run_id, final).state_name == "Cancelled", states_of(run_id)
    assert wait_for(run_id, final).run_count == 1


def test_a_late_report_of_a_death_does_not_stop_a_run_that_lives(stack: Stack) -> None:
    run_id = begin(CONFIG.model_copy(update={"min_steps": 3_000}))
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(run_id, Crashed(message="an earlier death"), force=True)
    wait_for(run_id, lambda run: bool(run.state and run.state.is_running()))
    ended = wait_for(run_id, lambda run: bool(run.state and run.state.is_completed()))
    assert ended.state_name in {"Champion kept", "Promoted"}
    names = [state.name for state in states_of(run_id)]
    assert "AwaitingRetry" not in names, names


def test_a_run_that_hangs_is_ended_by_its_limit_and_the_next_one_goes(stack: Stack) -> None:
    run_id = begin(LONG, "time_limit_minutes=0.5")
    out = prefect("deployment", "run", "train/weekly", "--param", "dataset=digits")
    (word,) = re.findall(r"UUID: (\S+)", out)
    hung = wait_for(run_id, final)
    assert hung.state
    assert hung.state_name == "Timed out"
    assert "more than 0.5 minutes" in str(hung.state.message)
    following = wait_for(UUID(word), final)
    assert following.state
    assert following.state.is_completed(), following.state.message
    assert wait_for(run_id, final).state_name == "Timed out"
