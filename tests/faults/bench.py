"""A stack of one's own whose processes reach each other through proxies that can misbehave."""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

import psutil
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.settings import PREFECT_API_URL, temporary_settings

from deployments import notify, processes
from deployments.services import worker
from deployments.stack import PROJECT, Ports, Stack, environment, start, stop
from tests.faults.plant import Plants
from tests.faults.proxy import HOST, Kind, Mode, Proxy
from tests.inbox import Inbox, open_inbox
from tests.reaper import reaped

PATIENCE_SECONDS = 120
"""How long tasks wait for a service; an outage of the table lasts some seconds."""

SERVICES = ("S3 server", "MLflow server", "Prefect server", "worker")


@dataclass(frozen=True)
class ProxiedStack(Stack):
    """A stack whose addresses, for everything that it starts, are those of the proxies."""

    proxies: Ports = field(default_factory=Ports)

    @property
    def prefect_url(self) -> str:
        """The address of the proxy in front of Prefect."""
        return f"http://{HOST}:{self.proxies.prefect}"

    @property
    def mlflow_url(self) -> str:
        """The address of the proxy in front of MLflow."""
        return f"http://{HOST}:{self.proxies.mlflow}"

    @property
    def s3_url(self) -> str:
        """The address of the proxy in front of S3."""
        return f"http://{HOST}:{self.proxies.s3}"


@dataclass(frozen=True)
class Bench:
    """The running stack, the ways to break it, and a client that no fault touches."""

    stack: ProxiedStack
    proxies: Mapping[Kind, Proxy]
    plants: Plants
    inbox: Inbox
    prefect: SyncPrefectClient

    @contextmanager
    def outage(self, kind: Kind, mode: Mode) -> Iterator[None]:
        """Let a service misbehave meanwhile."""
        self.proxies[kind].switch(mode)
        try:
            yield
        finally:
            self.proxies[kind].switch("pass")

    def run(self, deployment: str, parameters: Mapping[str, object]) -> UUID:
        """Start a run of a deployment, as its form does."""
        found = self.prefect.read_deployment_by_name(deployment)
        made = self.prefect.create_flow_run_from_deployment(found.id, parameters=dict(parameters))
        return made.id

    def wait(
        self, run: UUID, holds: Callable[[FlowRun], bool], seconds: float
    ) -> tuple[FlowRun, bool]:
        """Look at a run until something holds or the time is up; return it, and which of both."""
        deadline = time.monotonic() + seconds
        while True:
            found = self.prefect.read_flow_run(run)
            if holds(found):
                return found, True
            if time.monotonic() > deadline:
                return found, False
            time.sleep(0.2)

    def states(self, run: UUID) -> list[State]:
        """Return all states of a run, in order."""
        return sorted(self.prefect.read_flow_run_states(run), key=lambda state: state.timestamp)

    def service(self, name: str) -> list[psutil.Process]:
        """Return the processes of a service of the stack, oldest first; of a worker, itself alone.

        The runs of a worker outlive it.
        """
        found = [p for p, its in processes.find(self.stack.root).items() if its == name]
        if name != "worker":
            return found
        command = worker(self.stack).command
        return [process for process in found if processes.runs(process, command)]

    def missing(self, seconds: float) -> list[str]:
        """Wait until every service is there; return the names of those that do not come."""
        deadline = time.monotonic() + seconds
        while (missing := [name for name in SERVICES if not self.service(name)]) and (
            time.monotonic() < deadline
        ):
            time.sleep(0.2)
        return missing

    def restart(self) -> None:
        """Start what is not running any more, as a person would with `make up`."""
        start(self.stack, say=_quiet)


@contextmanager
def temporary_variables(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables of our own environment meanwhile."""
    before = dict(os.environ)
    os.environ |= variables
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def opened(root: Path) -> Iterator[Bench]:
    """Start a stack under a folder, with every deployment; stop it at the end."""
    ports, proxy_ports = Ports.free(), Ports.free()
    while set(vars(ports).values()) & set(vars(proxy_ports).values()):
        proxy_ports = Ports.free()
    stack = ProxiedStack(root, ports, proxy_ports)
    plants = Plants(root / "faults")
    proxies: dict[Kind, Proxy] = {
        "s3": Proxy("s3", stack.proxies.s3, ports.s3),
        "mlflow": Proxy("mlflow", stack.proxies.mlflow, ports.mlflow),
        "prefect": Proxy("prefect", stack.proxies.prefect, ports.prefect),
    }
    direct = environment(Stack(root, ports)) | {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
    hooks = plants.environment() | {
        "FAULTS_PROXIES": json.dumps(vars(proxy_ports)),
        "RETRAINING_PATIENCE_SECONDS": str(PATIENCE_SECONDS),
    }
    with (
        reaped(root),
        temporary_variables(direct | hooks),
        temporary_settings({PREFECT_API_URL: direct["PREFECT_API_URL"]}),
        open_inbox() as inbox,
    ):
        try:
            start(stack, deploy=PROJECT / "deployments" / "prefect.yaml", say=_quiet)
            with get_client(sync_client=True) as prefect:
                notify.add(prefect, inbox.address("take"))
                yield Bench(stack, proxies, plants, inbox, prefect)
        finally:
            stop(stack, say=_quiet)
            for proxy in proxies.values():
                proxy.close()


def _quiet(_sentence: str) -> None:
    """Keep the terminal for the table; StackError tells what goes wrong."""
