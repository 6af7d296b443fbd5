"""The local stack, with its real programs: what can go wrong with it, one after the other.

One stack is started once and then mistreated; a test that needs it whole brings it up itself.
"""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import boto3
import httpx
import psutil
import pytest
import yaml

from deployments import processes
from deployments.due import TAG
from deployments.services import PROJECT, Ports, Stack, environment, s3_server
from deployments.stack import StackError, prefect_api, start, stop

NAP = """
import json, os, time
from pathlib import Path
from prefect import flow
from prefect.states import Completed

@flow
def nap(note: str, seconds: float = 0):
    Path(note).write_text(json.dumps({"pid": os.getpid(), "environment": dict(os.environ)}))
    time.sleep(seconds)
    return Completed(name="Promoted")
"""
DEPLOYMENT = """
name: naps
pull: []
deployments:
  - name: now
    entrypoint: nap.nap
"""

T = TypeVar("T")


@pytest.fixture(scope="module")
def naps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a prefect.yaml with one small flow, which processes started from here can import."""
    folder = tmp_path_factory.mktemp("naps")
    (folder / "nap.py").write_text(NAP)
    (folder / "prefect.yaml").write_text(DEPLOYMENT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        yield folder / "prefect.yaml"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, naps: Path) -> Iterator[Stack]:
    stack = Stack(tmp_path_factory.mktemp("stack"), Ports.free())
    try:
        start(stack, deploy=naps)
        yield stack
    finally:
        stop(stack)


@pytest.fixture
def up(stack: Stack) -> Stack:
    """Return the stack, complete."""
    start(stack)
    return stack


@pytest.fixture
def unused(tmp_path: Path) -> Iterator[Stack]:
    """Return a stack that has never been started."""
    stack = Stack(tmp_path / "unused", Ports.free())
    yield stack
    stop(stack)


@pytest.fixture
def said() -> list[str]:
    return []


def api(stack: Stack, path: str, content: object = None) -> Any:
    method = "GET" if content is None else "POST"
    with prefect_api(stack) as ask:
        return ask(method, path, content)


def until(ask: Callable[[], T], wanted: Callable[[T], bool], seconds: float = 60) -> T:
    deadline = time.monotonic() + seconds
    while not wanted(answer := ask()):
        assert time.monotonic() < deadline, f"still {answer!r} after {seconds} s"
        time.sleep(0.1)
    return answer


def state_of(stack: Stack, run: str) -> str:
    return str(api(stack, f"/flow_runs/{run}")["state"]["name"])


def nap(stack: Stack, note: Path, seconds: float = 0) -> str:
    deployment = api(stack, "/deployments/name/nap/now")["id"]
    parameters = {"note": str(note), "seconds": seconds}
    run = api(stack, f"/deployments/{deployment}/create_flow_run", {"parameters": parameters})
    return str(run["id"])


def napping(stack: Stack, note: Path) -> tuple[str, psutil.Process]:
    run = nap(stack, note, seconds=600)
    until(lambda: state_of(stack, run), lambda state: state == "Running")
    until(note.exists, bool)
    return run, psutil.Process(json.loads(note.read_text())["pid"])


def answers(address: str) -> bool:
    try:
        httpx.get(address, trust_env=False)
    except httpx.TransportError:
        return False
    return True


def command_line(stack: Stack, command: str) -> subprocess.Popen[str]:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
    ports = {f"STACK_{k.upper()}_PORT": str(v) for k, v in vars(stack.ports).items()}
    return subprocess.Popen(
        [sys.executable, "-m", "deployments.stack", command],
        cwd=PROJECT,
        env=os.environ | ports | {"STACK_ROOT": str(stack.root), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def named(stack: Stack, name: str) -> list[psutil.Process]:
    """Return a service's processes, oldest first."""
    return [process for process, found in processes.find(stack.root).items() if found == name]


def test_a_run_goes_through_the_worker_with_the_stacks_variables(up: Stack, tmp_path: Path) -> None:
    run = nap(up, tmp_path / "note")
    until(lambda: state_of(up, run), lambda state: state == "Promoted")
    seen = json.loads((tmp_path / "note").read_text())["environment"]
    handed = {k: v for k, v in environment(up).items() if v not in ("true", "false")}
    assert {name: seen.get(name) for name in handed} == handed  # Prefect writes booleans anew


def test_everything_listens_on_the_loopback_only(up: Stack) -> None:
    found = processes.find(up.root)
    listening = []
    for process in found:
        with suppress(psutil.NoSuchProcess):  # a flow run's may end meanwhile
            open_sockets = process.net_connections()
            listening += [each.laddr for each in open_sockets if each.status == "LISTEN"]
    assert {ip for ip, _ in listening} == {"127.0.0.1"}
    assert {port for _, port in listening} >= set(vars(up.ports).values())


def test_the_keys_are_the_owners_alone(up: Stack) -> None:
    keys = up.root / "keys.json"
    assert stat.S_IMODE(keys.stat().st_mode) == 0o600
    assert stat.S_IMODE(up.root.stat().st_mode) == 0o700
    lines = [" ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])]
    logs = [log.read_text() for log in (up.root / "logs").iterdir()]
    assert logs
    for key in json.loads(keys.read_text()).values():
        assert not [text for text in lines + logs if key in text]


def test_s3_refuses_a_stranger(up: Stack) -> None:
    answer = httpx.get(f"{up.s3_url}/mnist-retraining", trust_env=False)
    assert answer.is_client_error


def eldest(stack: Stack) -> dict[str, psutil.Process]:
    """Return the process that each service began with; what it starts itself comes and goes."""
    return {name: process for process, name in reversed(processes.find(stack.root).items())}


def test_a_second_up_finds_everything_there(up: Stack, said: list[str]) -> None:
    before, automations = eldest(up), api(up, "/automations/filter", {})
    start(up, say=said.append)
    assert said == ["already running: S3 server, MLflow server, Prefect server, worker, keeper"]
    assert eldest(up) == before
    assert api(up, "/automations/filter", {}) == automations
    names = [automation["name"] for automation in automations]
    assert names == ["crash-runs-that-never-start", "crash-silent-runs"]


def test_a_half_started_stack_is_completed(up: Stack, said: list[str]) -> None:
    """MLflow's child survives its parent and holds the port: a pid file would not know it."""
    mlflow, uvicorn = named(up, "MLflow server")
    (rclone,) = named(up, "S3 server")
    (keeper,) = named(up, "keeper")  # which would complete it by itself
    for process in (keeper, mlflow, rclone):
        process.kill()
        process.wait(10)
    assert uvicorn.is_running()
    start(up, say=said.append)
    assert f"stopped pid {uvicorn.pid}, which an earlier MLflow server has left over" in said
    assert "already running: Prefect server, worker" in said
    assert httpx.get(f"{up.mlflow_url}/health", trust_env=False).status_code == 200


def test_a_killed_worker_is_back_by_itself_and_its_run_goes_on(up: Stack, tmp_path: Path) -> None:
    _, process = napping(up, tmp_path / "note")
    (worker,) = (p for p in named(up, "worker") if "worker" in p.cmdline())
    worker.kill()
    worker.wait(10)
    until(lambda: [p for p in named(up, "worker") if "worker" in p.cmdline()], bool, seconds=120)
    assert process.is_running()
    said = "worker had ended and is started again"
    until(lambda: up.log("keeper").read_text(), lambda text: said in text)
    assert "started!" in up.log("worker.previous").read_text()
    process.kill()


def test_killed_servers_are_back_by_themselves(up: Stack) -> None:
    (before,) = named(up, "S3 server")
    before.kill()
    until(lambda: [p for p in named(up, "S3 server") if p != before], bool, seconds=120)
    until(lambda: answers(up.s3_url), bool)
    known = named(up, "MLflow server")  # its child, which outlives it, holds the port
    known[0].kill()
    until(lambda: [p for p in named(up, "MLflow server") if p not in known], bool)
    until(lambda: answers(up.mlflow_url), bool, seconds=180)


def test_a_killed_run_crashes_and_the_next_one_goes(up: Stack, tmp_path: Path) -> None:
    run, process = napping(up, tmp_path / "killed")
    process.kill()
    until(lambda: state_of(up, run), lambda state: state == "Crashed")
    again = nap(up, tmp_path / "again")
    until(lambda: state_of(up, again), lambda state: state == "Promoted")


def test_a_run_that_falls_silent_crashes_and_one_that_ends_under_its_own_name_does_not(
    up: Stack,
) -> None:
    """The automation of deployments/automations.yaml, with 10 seconds instead of 90."""
    text = (PROJECT / "deployments" / "automations.yaml").read_text()
    automation = yaml.safe_load(text)["automations"][0]
    assert automation["name"] == "crash-silent-runs"
    automation["trigger"]["within"] = 10
    api(up, "/automations/", automation | {"name": "sooner"})
    flow = api(up, "/flows/", {"name": "silent"})["id"]
    running = {"type": "RUNNING", "name": "Running"}
    silent, ended = (
        api(up, "/flow_runs/", {"flow_id": flow, "state": running, "tags": [TAG]})["id"]
        for _ in range(2)
    )
    now = datetime.now(UTC).isoformat()  # to the microsecond: after the runs began
    beats = [
        {"event": "prefect.flow-run.heartbeat", "occurred": now, "id": run, "payload": {}}
        | {"resource": {"prefect.resource.id": f"prefect.flow-run.{run}"}}
        | {
            "related": [
                {"prefect.resource.id": f"prefect.tag.{TAG}", "prefect.resource.role": "tag"}
            ]
        }
        for run in (silent, ended)
    ]
    api(up, "/events", beats)
    promoted = {"state": {"type": "COMPLETED", "name": "Promoted"}}
    api(up, f"/flow_runs/{ended}/set_state", promoted)
    until(lambda: state_of(up, silent), lambda state: state == "Crashed", seconds=40)
    assert state_of(up, ended) == "Promoted"


def test_down_stops_everything_and_up_finds_the_data_again(
    up: Stack, tmp_path: Path, said: list[str]
) -> None:
    run, process = napping(up, tmp_path / "note")
    keys = environment(up)
    s3 = boto3.client(
        "s3",
        endpoint_url=up.s3_url,
        aws_access_key_id=keys["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=keys["AWS_SECRET_ACCESS_KEY"],
        region_name="us-east-1",
    )
    s3.put_object(Bucket="mnist-retraining", Key="a/b", Body=b"kept")
    experiment = {"name": "kept"}
    mlflow = f"{up.mlflow_url}/api/2.0/mlflow/experiments"
    httpx.post(f"{mlflow}/create", json=experiment, trust_env=False).raise_for_status()
    # Whatever the stack's processes have started, marked or not:
    trees = {child for p in processes.find(up.root) for child in processes.family(p)}
    assert process in trees

    stop(up, say=said.append)
    assert [p for p in trees if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []
    assert processes.find(up.root) == {}
    assert f"stopped flow run, pid {process.pid}" in said

    stop(up, say=said.append)
    assert said[-1] == "nothing is running"

    start(up)
    assert s3.get_object(Bucket="mnist-retraining", Key="a/b")["Body"].read() == b"kept"
    named_so = {"experiment_name": "kept"}
    found = httpx.get(f"{mlflow}/get-by-name", params=named_so, trust_env=False)
    assert found.status_code == 200
    # It said so while it was being stopped; a run left Running would hold the slot.
    assert state_of(up, run) == "Crashed"


def test_a_busy_port_is_named_with_its_holder_and_its_variable(unused: Stack) -> None:
    with socket.create_server(("127.0.0.1", unused.ports.mlflow)):
        up = command_line(unused, "up")
        _, error = up.communicate(timeout=60)
    assert up.returncode == 1
    assert error.startswith(f"port {unused.ports.mlflow} of the MLflow server is held by ")
    assert f"pid {os.getpid()}" in error
    assert "STACK_MLFLOW_PORT" in error
    assert processes.find(unused.root) == {}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_up_leaves_no_process(unused: Stack, number: signal.Signals) -> None:
    up = command_line(unused, "up")
    until(lambda: len(processes.find(unused.root)), lambda count: count >= 3)
    up.send_signal(number)
    _, error = up.communicate(timeout=60)
    # By itself or, where an exec() was interrupted, by CPython: a shell shows 130 for both.
    assert up.returncode in (130, -signal.SIGINT)
    assert error == "up interrupted: what it had started is stopped\n"
    assert processes.find(unused.root) == {}


def test_a_service_that_dies_is_named_with_the_end_of_its_log(
    unused: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = [sys.executable, "-c", "print('no space left'); raise SystemExit(7)"]
    monkeypatch.setattr(
        "deployments.stack.s3_server", lambda stack: replace(s3_server(stack), command=broken)
    )
    with pytest.raises(StackError, match="S3 server ended with exit code 7") as raised:
        start(unused)
    assert f"The end of {unused.log('s3')}:\nno space left" in str(raised.value)
    assert processes.find(unused.root) == {}


def test_two_commands_at_once_wait_for_each_other(unused: Stack, said: list[str]) -> None:
    environment(unused)
    with processes.one_at_a_time(unused.root, said.append):
        second = command_line(unused, "up")
        assert second.stdout is not None
        assert second.stdout.readline().startswith("waiting for another command")
        second.send_signal(signal.SIGINT)
        second.communicate(timeout=60)
    assert second.returncode in (130, -signal.SIGINT)


def test_status_of_a_stack_that_is_down(unused: Stack) -> None:
    status = command_line(unused, "status")
    output, _ = status.communicate(timeout=60)
    assert status.returncode == 3
    assert output.count("not running") == 5


def test_a_port_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STACK_S3_PORT", "nine")
    with pytest.raises(StackError, match="STACK_S3_PORT must be a port number, not 'nine'"):
        Ports.configured()


def test_keys_are_made_once(unused: Stack) -> None:
    first = environment(unused)
    assert environment(unused) == first
    assert environment(replace(unused, root=unused.root.parent / "other")) != first
