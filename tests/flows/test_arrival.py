"""What arrives makes one run after a quiet period, and then a training, on the real servers."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun

from deployments.drop import announce, drop
from deployments.stack import PROJECT, Stack
from deployments.tour import begin, sample_parts
from mnist_cnn.digits import Digits
from mnist_cnn.sample import embedded_sample
from tasks.arrivals.batch_files import BadBatch, write_parquet
from tasks.datasets.ledger import read_ledger
from tasks.services.s3 import DEFAULT_STORE, Store

QUIET_SECONDS = 10  # the least that Prefect allows


@pytest.fixture(scope="module")
def soon(stack: Stack) -> Iterator[None]:
    """Replace the automation that waits for arrivals by a copy that waits for less long."""
    with httpx.Client(base_url=f"{stack.prefect_url}/api", trust_env=False, timeout=60) as api:
        automations = api.post("/automations/filter", json={}).raise_for_status().json()
        (found,) = (a for a in automations if a["name"] == "ingest-after-arrivals")
        ours = {key: found[key] for key in ("name", "description", "enabled", "trigger", "actions")}
        hasty: dict[str, Any] = ours | {"trigger": ours["trigger"] | {"within": QUIET_SECONDS}}
        api.put(f"/automations/{found['id']}", json=hasty).raise_for_status()
        yield
        api.put(f"/automations/{found['id']}", json=ours).raise_for_status()


def dimmed(digits: Digits, by: float) -> Digits:
    """Return digits that nobody has seen, of a slightly thinner ink."""
    return Digits((digits.images * (1 - by)).astype(np.uint8), digits.labels)


def runs_of(flow: str, dataset: str) -> list[FlowRun]:
    with get_client(sync_client=True) as prefect:
        flows = {found.id: found.name for found in prefect.read_flows()}
        return [
            run
            for run in prefect.read_flow_runs()
            if flows[run.flow_id] == flow and run.parameters.get("dataset") == dataset
        ]


def is_final(run: FlowRun) -> bool:
    return bool(run.state and run.state.is_final())


def wait_until(holds: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.5)


def ended(flow: str, dataset: str) -> Callable[[], bool]:
    return lambda: any(run.state and run.state.is_final() for run in runs_of(flow, dataset))


def named(runs: list[FlowRun], but: str) -> list[FlowRun]:
    """Leave out what a repeated event made: the deployment's limit turns it into nothing.

    Prefect repeats one whose handling it could not write down, as when its SQLite is locked.
    """
    return [run for run in runs if run.state and run.state.name != but]


def test_ten_drops_make_one_ingest_and_then_one_training(stack: Stack, soon: None) -> None:
    dataset = "ten-drops"
    parts = sample_parts((1_000, 360, 197, 120, 120))
    begin(dataset, parts)
    images = parts.train
    with get_client(sync_client=True) as prefect:
        for number in range(10):
            batch = dimmed(images.part(60 * number, 60 * number + 400), (1 + number) / 100)
            drop(dataset, f"batch-{number}", {"part.parquet": write_parquet(batch)})
            announce(prefect, dataset, f"batch-{number}")
    wait_until(ended("ingest", dataset), 180)
    (ingest,) = named(runs_of("ingest", dataset), but="No batch")
    assert ingest.state
    assert ingest.state.name == "Batches accepted", ingest.state.message
    verdicts = read_ledger(Store(DEFAULT_STORE), dataset)
    assert [verdict.accepted for verdict in verdicts] == [True] * 10, ingest.state.message
    wait_until(lambda: any(run.start_time for run in runs_of("train", dataset)), 120)
    wait_until(lambda: all(is_final(run) for run in runs_of("train", dataset)), 300)
    (train,) = named(runs_of("train", dataset), but="Cancelled")
    assert train.state
    assert train.state.name == "Champion kept", train.state.message  # it has no policy
    time.sleep(2 * QUIET_SECONDS)  # the training took in nothing, and nothing follows it
    assert named(runs_of("ingest", dataset), but="No batch") == [ingest]
    assert named(runs_of("train", dataset), but="Cancelled") == [train]


def test_a_batch_without_files_or_with_a_name_that_is_taken_is_not_dropped(stack: Stack) -> None:
    files = {"part.parquet": write_parquet(embedded_sample()[0].part(0, 100))}
    drop("twice", "batch", files)
    with pytest.raises(BadBatch, match="choose another name"):
        drop("twice", "batch", files)
    with pytest.raises(BadBatch, match="no plain file name"):
        drop("twice", "../batch", files)
    with pytest.raises(BadBatch, match="no file"):
        drop("twice", "empty", {})
    assert Store(DEFAULT_STORE).names("datasets/twice/") == [
        "datasets/twice/incoming/batch/_SUCCESS",
        "datasets/twice/incoming/batch/part.parquet",
    ]


def test_the_command_drops_and_tells_what_happens_next(
    stack: Stack, soon: None, tmp_path: Path
) -> None:
    file = tmp_path / "part.parquet"
    file.write_bytes(write_parquet(embedded_sample()[0].part(0, 100)))
    command = [sys.executable, "-m", "deployments.drop", "--dataset", "nobodys", "--batch", "a"]
    typed = subprocess.run(
        [*command, str(file)],
        cwd=PROJECT,
        env=os.environ | {"PREFECT_API_URL": f"{stack.prefect_url}/api"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert typed.returncode == 0, typed.stdout + typed.stderr
    assert "datasets/nobodys/incoming/a/ holds 1 files" in typed.stdout
    assert "begin train/weekly" in typed.stdout
    wait_until(ended("ingest", "nobodys"), 180)
    (ingest,) = runs_of("ingest", "nobodys")
    assert ingest.state
    assert "datasets/nobodys/base/ lacks" in str(ingest.state.message)
