"""How soon what died is started again, and when a worker that has grown is found."""

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from deployments import processes
from deployments.keep import SETTLED, Attempts, find_grown
from deployments.services import Service, Stack, worker

_SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


def test_the_first_attempt_is_at_once_and_the_pauses_grow() -> None:
    attempts, now, times = Attempts(), 1000.0, list[float]()
    while now < 1200:
        if attempts.is_due(now):
            attempts.note(now)
            times.append(now - 1000)
        now += 1
    assert times == [0, 2, 7, 22, 52, 112, 172]


def test_what_lived_for_long_begins_anew() -> None:
    attempts = Attempts()
    for now in (1000.0, 1002.0, 1007.0):
        assert attempts.is_due(now)
        attempts.note(now)
    assert not attempts.is_due(1010)
    assert attempts.is_due(1007 + SETTLED + 1)
    attempts.note(1007 + SETTLED + 1)
    assert attempts.is_due(1007 + SETTLED + 4)


@pytest.fixture
def its_worker(tmp_path: Path) -> Iterator[Service]:
    """A program that stands for a worker, and runs."""
    described = replace(worker(Stack(tmp_path)), command=_SLEEP)
    _launch(described, tmp_path)
    yield described
    processes.end(processes.find(tmp_path))


def test_a_worker_that_has_grown_is_found(its_worker: Service, tmp_path: Path) -> None:
    (process,) = found = processes.find(tmp_path)
    assert find_grown(its_worker, found, most=2**20, young=0) == process
    assert find_grown(its_worker, found, most=2**20) is None  # it has just begun
    assert find_grown(its_worker, found, most=process.memory_info().rss * 2, young=0) is None
    processes.end([process])
    assert find_grown(its_worker, found, most=2**20, young=0) is None


def test_a_worker_with_a_flow_run_is_left_alone(its_worker: Service, tmp_path: Path) -> None:
    run = _launch(replace(its_worker, command=[*_SLEEP, "a flow run"]), tmp_path)
    assert find_grown(its_worker, processes.find(tmp_path), most=2**20, young=0) is None
    processes.end([run])
    assert find_grown(its_worker, processes.find(tmp_path), most=2**20, young=0) is not None


def _launch(service: Service, owner: Path) -> psutil.Process:
    """Launch a program, and return when it is the one that was asked for."""
    launched = processes.launch(
        service.name,
        service.command,
        owner=owner,
        variables=dict(os.environ),
        log=owner / "worker.log",
    )
    process = psutil.Process(launched.pid)
    while not processes.runs(process, service.command):  # until then it is a copy of this one
        assert launched.poll() is None, (owner / "worker.log").read_text()
        time.sleep(0.01)
    return process
