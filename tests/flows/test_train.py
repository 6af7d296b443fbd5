"""The weekly run through real servers, on `digits` wherever MNIST is not the point."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from urllib.request import Request, urlopen
from uuid import UUID

import mlflow
import pytest
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterId,
)
from prefect.client.schemas.objects import FlowRun

from deployments.stack import PROJECT, Stack
from flows.train import train
from mnist_cnn.digits import Digits
from mnist_cnn.sample import embedded_sample
from tasks.datasets.catalog import KNOWN
from tasks.datasets.ledger import read_base
from tasks.promote import find_champion
from tasks.records import RunSummary
from tasks.services.s3 import DEFAULT_STORE, Store


def type_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Type `prefect deployment run train/weekly …` as a person does."""
    command = [sys.executable, "-m", "prefect", "deployment", "run", "train/weekly", *arguments]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)


def typed_runs() -> list[FlowRun]:
    """Return the runs of train that no schedule made."""
    ours = FlowFilter(name=FlowFilterName(any_=["train"]))
    with get_client(sync_client=True) as prefect:
        runs = prefect.read_flow_runs(flow_filter=ours)
    return [run for run in runs if not run.auto_scheduled]


def trigger(*arguments: str) -> UUID:
    typed = type_command(*arguments)
    assert typed.returncode == 0, typed.stdout + typed.stderr
    (made,) = re.findall(r"UUID: (\S+)", typed.stdout)
    return UUID(made)


def wait_for(run_id: UUID, seconds: float = 240) -> FlowRun:
    deadline = time.monotonic() + seconds
    with get_client(sync_client=True) as prefect:
        while time.monotonic() < deadline:
            run = prefect.read_flow_run(run_id)
            if run.state and run.state.is_final():
                return run
            time.sleep(0.2)
    pytest.fail(f"run {run_id} is still {run.state}")


@pytest.fixture(scope="module")
def first_run(stack: Stack) -> FlowRun:
    """Return the first run of a new system: it finds no champion."""
    return wait_for(trigger("--param", "dataset=digits"))


@pytest.fixture(scope="module")
def summary(first_run: FlowRun) -> RunSummary:
    content = Store(DEFAULT_STORE).get(f"runs/{first_run.id}/summary.json")
    return RunSummary.model_validate_json(content)


def test_the_first_run_ends_promoted(first_run: FlowRun) -> None:
    assert first_run.state
    assert first_run.state.name == "Promoted", first_run.state.message
    assert first_run.name.startswith("digits-20")


def test_the_champion_says_where_it_came_from(first_run: FlowRun, summary: RunSummary) -> None:
    champion = find_champion.fn("digits-cnn")
    assert champion
    assert champion.model == summary.champion == summary.version
    tags = MlflowClient().get_model_version(champion.name, champion.version).tags
    assert tags["prefect.flow_run_id"] == str(first_run.id)
    assert tags["verdict"] == "promote"
    assert json.loads(tags["parameters"])["dataset"] == "digits"
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    edited = subprocess.run(["git", "diff", "HEAD", "--quiet"], cwd=PROJECT, check=False).returncode
    exact = commit.stdout.strip() + ("-dirty" if edited else "")
    assert tags["git_commit"] == (exact if commit.stdout else "not a git checkout")


def test_the_champion_loads_with_one_call_and_without_pickle(
    summary: RunSummary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    model = mlflow.pytorch.load_model("models:/digits-cnn@champion")
    test = embedded_sample()[1]
    right = model(torch.from_numpy(test.images)).argmax(1).numpy() == test.labels
    assert right.mean() == pytest.approx(summary.accuracy, abs=1e-9)


def test_the_run_shows_a_report_the_checks_and_its_progress(first_run: FlowRun) -> None:
    with get_client(sync_client=True) as prefect:
        artifacts = prefect.read_artifacts(
            artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[first_run.id]))
        )
    shown = {artifact.key: artifact for artifact in artifacts}
    assert str(shown["report"].data).startswith("# Promoted")
    assert "[decision record](http" in str(shown["report"].data).split("| check |")[0]
    assert "accuracy of the worst digit" in str(shown["checks"].data)
    assert shown["training"].type == "progress"
    assert float(str(shown["training"].data)) == 100


def test_every_link_opens(summary: RunSummary) -> None:
    assert {"Prefect run", "MLflow run", "registered version", "validation report"} <= set(
        summary.links
    )
    for address in summary.links.values():
        with urlopen(Request(address, headers={"Accept": "text/html"}), timeout=10) as answer:  # noqa: S310
            assert answer.status == 200


def test_links_to_records_open_a_copy_that_does_not_expire(
    first_run: FlowRun, summary: RunSummary
) -> None:
    """MLflow's page shows by JavaScript what a link names, so that is asked for here."""
    for name in ("decision record", "validation report", "snapshot", "model card", "data card"):
        run, path = re.findall(r"/runs/(\w+)/artifacts/(.+)", summary.links[name])[0]
        copy = mlflow.artifacts.load_text(f"runs:/{run}/{path}")
        assert "X-Amz-Expires" not in copy
        if name == "decision record":
            record = MlflowClient().get_model_version("digits-cnn", "1").tags["decision_record"]
            assert copy.encode() == Store(DEFAULT_STORE).get(Store(DEFAULT_STORE).name_of(record))
        elif name == "model card":
            evaluation = re.findall(r"\[its evaluation\]\(.+/artifacts/(.+?)\)", copy)[0]
            figures = json.loads(mlflow.artifacts.load_text(f"runs:/{run}/{evaluation}"))
            assert figures["accuracy"] == summary.accuracy


def test_a_second_run_with_nothing_new_is_skipped_with_the_reason(
    first_run: FlowRun, summary: RunSummary
) -> None:
    second = wait_for(trigger("--param", "dataset=digits"))
    assert second.state
    assert second.state.name == "Skipped"
    assert "the champion, version 1 was made of the same snapshot" in str(second.state.message)
    with get_client(sync_client=True) as prefect:
        tasks = prefect.read_task_runs(
            flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[second.id]))
        )
    assert not any(task.name.startswith("train_model") for task in tasks)
    told = Store(DEFAULT_STORE).get(f"runs/{second.id}/summary.json")
    assert RunSummary.model_validate_json(told).champion == summary.champion


def test_a_second_run_that_is_forced_sends_no_data_again_and_ends_by_rule(
    first_run: FlowRun, summary: RunSummary
) -> None:
    """The same data, code and seed give the same model: a tie, which keeps the champion."""
    names = Store(DEFAULT_STORE).names("datasets/digits/s")
    second = wait_for(trigger("--param", "dataset=digits", "--param", "force=true"))
    assert second.state
    assert second.state.name == "Champion kept"
    assert Store(DEFAULT_STORE).names("datasets/digits/s") == names
    champion = find_champion.fn("digits-cnn")
    assert champion
    assert champion.model == summary.champion


def test_a_second_run_waits_until_the_first_has_ended(first_run: FlowRun) -> None:
    active = trigger("--param", "dataset=digits", "--param", "force=true")
    with get_client(sync_client=True) as prefect:
        while not prefect.read_flow_run(active).start_time:  # else either may be the first
            time.sleep(0.2)
    second = wait_for(trigger("--param", "dataset=digits"))
    assert second.state
    assert second.state.is_completed(), second.state.message
    finished = wait_for(active, seconds=1)
    assert finished.state
    assert finished.state.is_completed(), finished.state.message
    assert finished.end_time
    with get_client(sync_client=True) as prefect:
        stages = prefect.read_task_runs(
            flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[second.id]))
        )
    begun = [stage.start_time for stage in stages if stage.name.startswith("check_services")]
    assert len(begun) == 1
    assert begun[0]
    assert begun[0] >= finished.end_time


@pytest.mark.parametrize(
    ("parameter", "sentence"),
    [
        ("dataset=Fashion MNIST", "dataset"),
        ('training={"epoch": 2}', "epoch"),
        ('training={"epochs": 0}', "epochs"),
        ('promotion={"accuracy_floor": 98}', "accuracy_floor"),
        ("data=mnist", "data"),
    ],
)
def test_a_parameter_that_is_wrong_is_refused_before_a_run_exists(
    stack: Stack, parameter: str, sentence: str
) -> None:
    before = len(typed_runs())
    typed = type_command("--param", parameter)
    assert typed.returncode != 0
    assert sentence in typed.stdout + typed.stderr
    assert len(typed_runs()) == before


def test_an_unknown_data_set_is_named_with_what_to_do(stack: Stack) -> None:
    run = wait_for(trigger("--param", "dataset=fashion"))
    assert run.state
    assert run.state.is_failed()
    assert "datasets/fashion/base/ lacks train-images-idx3-ubyte.gz" in str(run.state.message)


def inverted(digits: Digits) -> Digits:
    return Digits(255 - digits.images, digits.labels)


def blank(digits: Digits) -> Digits:
    images = digits.images.copy()
    images[: len(images) // 10] = 0
    return Digits(images, digits.labels)


@pytest.mark.parametrize("damage", [inverted, blank])
def test_bad_data_ends_the_run_before_training_and_changes_no_champion(
    stack: Stack,
    first_run: FlowRun,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Digits], Digits],
) -> None:
    train_split, test = embedded_sample()
    bad = KNOWN["digits"].model_copy(update={"fetch": lambda: (damage(train_split), test)})
    monkeypatch.setitem(KNOWN, "digits", bad)
    monkeypatch.setattr("flows.train.train_model", lambda *_: pytest.fail("it trained"))
    before = find_champion.fn("digits-cnn")
    place = f"{DEFAULT_STORE}/{damage.__name__}"  # where the data set has not begun
    state = train("digits", store=place, return_state=True)
    assert state.name == "Data rejected"
    assert state.is_failed()
    assert "expected" in str(state.message)
    assert find_champion.fn("digits-cnn") == before
    assert read_base(Store(place), "digits") is None
    summary = Store(place).get(f"runs/{state.state_details.flow_run_id}/summary.json")
    assert b"Data rejected" in summary


def test_a_registry_that_fails_in_the_middle_promotes_nothing(
    stack: Stack, first_run: FlowRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = find_champion.fn("digits-cnn")

    def broken(*_: object) -> None:
        raise MlflowException("INTERNAL_ERROR: database is locked")

    with monkeypatch.context() as fault:
        fault.setattr(MlflowClient, "get_registered_model", broken)
        fault.setattr("tasks.promote.find_champion.retries", 0, raising=False)
        state = train("digits", return_state=True)
    assert state.is_failed()
    assert "could not be read" in str(state.message)
    assert find_champion.fn("digits-cnn") == before


def test_the_demo_ends_with_verdict_and_addresses(stack: Stack) -> None:
    """`make demo` on a stack that is up: the data set is MNIST if MNIST_MIRROR has it."""
    ports = stack.ports
    settings = {
        "STACK_ROOT": str(stack.root),
        "STACK_PREFECT_PORT": str(ports.prefect),
        "STACK_MLFLOW_PORT": str(ports.mlflow),
        "STACK_S3_PORT": str(ports.s3),
    }
    demo = subprocess.run(
        [
            *(sys.executable, "-m", "deployments.demo", "--start"),
            *("--param", "dataset=auto", "--param", "force=true"),
            *("--param", 'training={"preset": "quick"}'),
        ],
        cwd=PROJECT,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert demo.returncode == 0, demo.stdout + demo.stderr
    for expected in ("train model", "the whole run", "accuracy", "/#/models/", "validation report"):
        assert expected in demo.stdout
    assert demo.stdout.strip().endswith("Stop it with: make down")


def test_a_prefect_server_that_does_not_answer_is_named_with_what_to_start() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "deployments.demo"],
        cwd=PROJECT,
        env=os.environ | {"PREFECT_API_URL": "http://127.0.0.1:1/api"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert "does not answer at http://127.0.0.1:1/api" in run.stderr
    assert "`make up`" in run.stderr
