"""Plant faults inside the processes of flow runs, without a line for it in the product.

Python imports a module of this name at its start from wherever `PYTHONPATH` has it. In a process
that was started for a flow run, it wraps what Prefect calls to run a task: if the folder
`FAULTS_FOLDER` holds a strike for this run and task (see tests/faults/plant.py), the fault is
planted just before the n-th request that the task makes to S3 or MLflow, or at its end if it makes
fewer. A strike is claimed by renaming its file, so that it happens once, whatever is repeated.

In the keeper of the local stack it only hands on the addresses of the proxies.
"""

import datetime as dt
import functools
import http.client
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

_FOLDER = os.environ.get("FAULTS_FOLDER")
_RUN = os.environ.get("PREFECT__FLOW_RUN_ID")
_READY_SECONDS = 20.0


class _AfterImport(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Call a function on a module once it is imported."""

    def __init__(self, wanted: Callable[[str], bool], act: Callable[[ModuleType], None]) -> None:
        self._wanted, self._act = wanted, act
        self._loaders: dict[str, importlib.abc.Loader] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not self._wanted(name):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec and spec.loader:
            self._loaders[name], spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loaders[spec.name].create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loaders[module.__name__].exec_module(module)
        self._act(module)


class _Striker:
    """Claim the strike for a task, count its requests, and plant the fault."""

    def __init__(self, folder: Path, run: str) -> None:
        self._folder, self._run = folder, run
        self._armed: tuple[Path, dict[str, object]] | None = None
        self._left, self._thread = 0, 0

    def around(self, task: str, body: Callable[[], object]) -> object:
        """Run the body of a task; strike in its middle, or at its end."""
        self._arm(task)
        try:
            result = body()
            self._strike()
        finally:
            self._disarm()
        return result

    def request(self) -> None:
        """Count a request that is about to be made, unless a thread beside the task makes it."""
        if self._armed and threading.get_ident() == self._thread:
            self._left -= 1
            if self._left < 0:
                self._strike()

    def _arm(self, task: str) -> None:
        for path in sorted(self._folder.glob("*.strike")):
            try:
                strike = json.loads(path.read_text())
            except FileNotFoundError:  # another run has claimed it
                continue
            if strike["task"] == task and strike["run"] in (self._run, None):
                self._armed, self._left = (path, strike), int(strike["request"])
                self._thread = threading.get_ident()
                return

    def _disarm(self) -> None:
        self._armed = None

    def _strike(self) -> None:
        if self._armed is None:
            return
        (path, strike), self._armed = self._armed, None
        struck = path.with_suffix(".struck")
        try:
            path.rename(struck)
        except FileNotFoundError:
            return
        struck.with_suffix(".by").write_text(f"{self._run} {time.time()}")
        _FAULTS[str(strike["fault"])](struck)


def _kill(_struck: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _terminate(_struck: Path) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _fill_memory(_struck: Path) -> None:
    """Limit the address space to little more than is used, and ask for more: a real MemoryError.

    The limit stays, as the limit of a container does.
    """
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
    bytearray(256 << 20)


def _fill_disk(_struck: Path) -> None:
    """Let no file of this process grow from now on, and write to a device that is full: ENOSPC."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    with Path("/dev/full").open("wb", buffering=0) as full:
        full.write(b"no space is left for this")


def _wait_for_service(struck: Path) -> None:
    """Wait until whoever planted the strike has switched the service."""
    deadline = time.monotonic() + _READY_SECONDS
    ready = struck.with_suffix(".ready")
    while not ready.exists():
        if time.monotonic() > deadline:
            raise RuntimeError(f"nobody made {ready}; the service was not switched")
        time.sleep(0.02)


_FAULTS: dict[str, Callable[[Path], None]] = {
    "kill": _kill,
    "terminate": _terminate,
    "memory": _fill_memory,
    "disk": _fill_disk,
    "service": _wait_for_service,
}


def _wrap_engine(engine: ModuleType) -> None:
    striker = _Striker(Path(str(_FOLDER)), str(_RUN))
    run_body = engine.SyncTaskRunEngine.call_task_fn
    send = http.client.HTTPConnection.putrequest

    def call_task_fn(self: Any, transaction: Any) -> Any:
        task, body = self.task, self.task.fn

        @functools.wraps(body)
        def struck(*arguments: object, **parameters: object) -> object:
            return striker.around(task.name, lambda: body(*arguments, **parameters))

        task.fn = struck
        try:
            return run_body(self, transaction)
        finally:
            task.fn = body

    def putrequest(self: http.client.HTTPConnection, *arguments: Any, **options: Any) -> None:
        striker.request()
        send(self, *arguments, **options)

    engine.SyncTaskRunEngine.call_task_fn = call_task_fn
    http.client.HTTPConnection.putrequest = putrequest  # type: ignore[method-assign]


def _shift_clock(days: float) -> Callable[[ModuleType], None]:
    """Return what lets a module of tasks read a clock that is wrong by so many days."""

    class Shifted(dt.datetime):
        @classmethod
        def now(cls, tz: dt.tzinfo | None = None) -> dt.datetime:  # type: ignore[override]
            return dt.datetime.now(tz) + dt.timedelta(days=days)

    def shift(module: ModuleType) -> None:
        if getattr(module, "datetime", None) is dt.datetime:
            vars(module)["datetime"] = Shifted

    return shift


def _redirect(services: ModuleType) -> None:
    """Let the keeper start services again behind the proxies at which `make up` began them."""
    for name, port in json.loads(os.environ["FAULTS_PROXIES"]).items():
        setattr(services.Stack, f"{name}_url", f"http://{services.HOST}:{port}")


if _FOLDER and os.environ.get("MNIST_STACK_SERVICE") == "keeper":
    _keeps = _AfterImport(lambda name: name == "deployments.services", _redirect)
    sys.meta_path.insert(0, _keeps)
if _FOLDER and _RUN:
    sys.meta_path.insert(0, _AfterImport(lambda name: name == "prefect.task_engine", _wrap_engine))
    _clock = Path(_FOLDER, f"{_RUN}.clock")
    with suppress(FileNotFoundError):  # whichever run comes next has the wrong clock
        Path(_FOLDER, "next.clock").rename(_clock)
    if _clock.exists():
        _shift = _shift_clock(float(_clock.read_text()))
        sys.meta_path.insert(0, _AfterImport(lambda name: name.startswith("tasks."), _shift))
