"""Start, stop and show the local stack: Prefect, MLflow, S3, a worker, and what keeps them alive.

All of them listen on the loopback only.
"""

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
import psutil

from deployments import processes
from deployments.deploy import deploy, set_automations
from deployments.due import Ask, Unscheduled, table, wait_for_runs
from deployments.services import (
    BUCKET,
    HOST,
    POOL,
    PROJECT,
    Ports,
    Service,
    Stack,
    StackError,
    environment,
    inherited_environment,
    keeper,
    mlflow_server,
    port_variable,
    prefect_server,
    s3_server,
    worker,
)

__all__ = ["PROJECT", "Ports", "Stack", "StackError", "environment", "start", "status", "stop"]

PATIENCE = 600.0  # seconds until all must be ready: a busy machine reads a gigabyte of cold files

Say = Callable[[str], None]


def start(
    stack: Stack, *, deploy: Path | None = None, reset: bool = False, say: Say = print
) -> None:
    """Start the missing services, wait until all are ready, and deploy a prefect.yaml.

    Edits that were made on the Prefect server are kept; `reset` replaces them by the files. After
    any failure, Ctrl-C included, the services that this call started are stopped again. Raises
    StackError.
    """
    environment(stack)  # makes the folder and the keys
    with processes.one_at_a_time(stack.root, say):
        before = processes.find(stack.root)
        # BaseException, since Ctrl-C must not leave half a stack behind.
        try:
            _start(stack, deploy, say, reset=reset)
        except BaseException:
            processes.end(processes.find(stack.root).keys() - before.keys())
            raise


def stop(stack: Stack, *, say: Say = print) -> None:
    """Stop every process of the stack; its data stays.

    The keeper ends first, because it would restart the others. Next come the flow runs, which can
    still report their crash to the server, then their worker, then the servers.
    """
    if not processes.find(stack.root):
        say("nothing is running")
        return
    with processes.one_at_a_time(stack.root, say):
        _end_all(lambda: _named(stack, "keeper"), say)
        _end_all(lambda: _flow_runs(stack), say)
        _end_all(lambda: _named(stack, "worker"), say)
        _end_all(lambda: processes.find(stack.root), say)


def status(stack: Stack, *, say: Say = print) -> bool:
    """Print the state of each service and the next due time of each schedule.

    Returns True if all services are ready. Raises Unscheduled.
    """
    answers = {}
    for service in all_services(stack):
        process = running(stack, service)
        ready = process is not None and service.is_ready(process.create_time())
        answers[service.name] = ready
        state = "ready" if ready else "does not answer" if process else "not running"
        pid = process.pid if process else "-"
        say(f"{service.name:14} {state:15} pid {pid:<8} {service.address:22} log {service.log}")
    if answers[prefect_server(stack).name]:
        _report_due(stack, say)
    return all(answers.values())


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return 0, 1 after an error, 3 if something is down, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m deployments.stack", description=__doc__)
    parser.add_argument("command", choices=["up", "down", "status"])
    parser.add_argument("--reset", action="store_true", help="undo what was edited in Prefect's UI")
    options = parser.parse_args(arguments)
    command = options.command
    # SIGTERM and SIGHUP end the command like Ctrl-C, so that `start` cleans up after them as well.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, _interrupt)
    try:
        stack = Stack.configured()
        if command == "up":
            start(stack, deploy=PROJECT / "deployments" / "prefect.yaml", reset=options.reset)
        elif command == "down":
            stop(stack)
        elif not status(stack):
            return 3
    except StackError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        left = {"up": "what it had started is stopped", "down": "run it again to finish"}
        print(f"{command} interrupted: {left.get(command, 'it changes nothing')}", file=sys.stderr)
        return 130
    return 0


@dataclass
class _Start:
    """One attempt to start services: its start, in seconds since the epoch, and its processes."""

    stack: Stack
    say: Say
    begin: float = field(default_factory=time.time)
    launched: dict[Service, subprocess.Popen[bytes]] = field(default_factory=dict)

    def launch(self, service: Service) -> None:
        self.say(f"{service.name} is starting")
        self.launched[service] = launch(self.stack, service)

    def wait_for(self, *services: Service) -> None:
        """Wait until all services are ready.

        Raises StackError if a launched process ends, or after `PATIENCE` seconds.
        """
        waiting = list(services)
        while waiting:
            for service, process in self.launched.items():
                if process.poll() is not None:
                    raise StackError(
                        f"{service.name} ended with exit code {process.returncode} while the "
                        f"stack was starting. {processes.tail(service.log)}"
                    )
            # For a service that ran before, any sign of life counts, however old.
            since = {service: self.begin if service in self.launched else 0 for service in waiting}
            ready = [service for service in waiting if service.is_ready(since[service])]
            waiting = [service for service in waiting if service not in ready]
            took = time.time() - self.begin
            for service in ready:
                if service in self.launched:
                    self.say(f"{service.name} ready after {took:.1f} s: {service.address}")
            if waiting and took > PATIENCE:
                raise StackError(
                    f"{waiting[0].name} runs, but did not answer within {PATIENCE:.0f} s. "
                    f"`make down`, then try again. {processes.tail(waiting[0].log)}"
                )
            time.sleep(0.1 if waiting else 0)


def _start(stack: Stack, prefect_yaml: Path | None, say: Say, *, reset: bool) -> None:
    """Start the missing services and deploy.

    The servers start side by side. The worker and the deployments wait for Prefect's server only,
    and the keeper starts last.
    """
    services = all_services(stack)
    _end_leftovers(stack, say)
    missing = [service for service in services if running(stack, service) is None]
    there = [service.name for service in services if service not in missing]
    if there:
        say(f"already running: {', '.join(there)}")
    _check_ports(missing)
    (stack.root / "s3" / BUCKET).mkdir(parents=True, exist_ok=True)  # a top folder is a bucket
    (stack.root / "logs").mkdir(exist_ok=True)

    attempt = _Start(stack, say)
    *servers, prefect, its_worker, its_keeper = services
    for service in (*servers, prefect):
        if service in missing:
            attempt.launch(service)
    attempt.wait_for(prefect)
    with prefect_api(stack) as ask:
        _make_pool(ask)
        set_automations(ask, stack, reset=reset, say=say)
        if its_worker in missing:
            attempt.launch(its_worker)
        if prefect_yaml is not None:  # while the worker starts
            say(f"deploying {prefect_yaml}")
            deploy(ask, stack, prefect_yaml, reset=reset, say=say)
            _keep_rules(stack)
    attempt.wait_for(*servers, its_worker)
    if its_keeper in missing:
        attempt.launch(its_keeper)
        attempt.wait_for(its_keeper)
    if prefect_yaml is not None:
        _report_due(stack, say)


def _keep_rules(stack: Stack) -> None:
    """Create the server's own alarm rules at deployment.

    The server then reports that no worker runs even before a worker has ever run a flow.
    """
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from tasks.watch.alarms import keep_rules
    from tasks.watch.notifications import find_recipients, known_to_server

    url = {PREFECT_API_URL: f"{stack.prefect_url}/api"}
    with temporary_settings(url), get_client(sync_client=True) as prefect:
        keep_rules(prefect, known_to_server(find_recipients(prefect)))


def all_services(stack: Stack) -> list[Service]:
    """Return every service of the stack, in the order of their start."""
    servers = [s3_server(stack), mlflow_server(stack), prefect_server(stack)]
    return [*servers, worker(stack), keeper(stack)]


def launch(stack: Stack, service: Service) -> subprocess.Popen[bytes]:
    """Start a service; the log of its last start is kept as `.previous.log`."""
    return processes.launch(
        service.name,
        service.command,
        owner=stack.root,
        variables=inherited_environment(stack) | service.settings,
        log=service.log,
    )


def running(stack: Stack, service: Service) -> psutil.Process | None:
    """Return a service's main process; None if it has none."""
    found = processes.find(stack.root)
    return next((p for p in found if processes.runs(p, service.command)), None)


def _named(stack: Stack, name: str) -> dict[psutil.Process, str]:
    return {p: found for p, found in processes.find(stack.root).items() if found == name}


def _flow_runs(stack: Stack) -> dict[psutil.Process, str]:
    """Return the processes that inherited the worker's name, but are not the worker itself."""
    command = worker(stack).command
    return {p: "flow run" for p in _named(stack, "worker") if not processes.runs(p, command)}


def _end_all(find: Callable[[], dict[psutil.Process, str]], say: Say) -> None:
    """End the processes of `find` until it returns none.

    Once is not enough: a program may start another while it is being ended.
    """
    while found := find():
        killed = processes.end(found)
        for process, name in found.items():
            say(f"{'killed' if process in killed else 'stopped'} {name}, pid {process.pid}")


def _end_leftovers(stack: Stack, say: Say) -> None:
    """End the leftover processes of dead servers: one may still hold its server's port.

    Flow runs whose worker died go on.
    """
    flow_runs = _flow_runs(stack)
    leftovers = {p: name for p, name in processes.find(stack.root).items() if p not in flow_runs}
    for service in all_services(stack):
        main_process = running(stack, service)
        for process in processes.family(main_process) if main_process else []:
            leftovers.pop(process, None)
    processes.end(leftovers)
    for process, name in leftovers.items():
        say(f"stopped pid {process.pid}, which an earlier {name} has left over")


def _check_ports(services: list[Service]) -> None:
    """Raise StackError if another program holds a port, with all such ports in one message."""
    held = []
    for name, (variable, port) in ((s.name, s.port) for s in services if s.port is not None):
        holder = processes.port_holder(HOST, port)
        if holder is not None:
            held.append(
                f"port {port} of the {name} is held by {holder}: "
                f"end that, or choose another port with {port_variable(variable)}."
            )
    if held:
        raise StackError("\n".join([*held, "Nothing was started."]))


def _make_pool(ask: Ask) -> None:
    pools = ask("POST", "/work_pools/filter", {})
    if POOL not in [pool["name"] for pool in pools]:
        ask("POST", "/work_pools/", {"name": POOL, "type": "process"})


@contextmanager
def prefect_api(stack: Stack) -> Iterator[Ask]:
    """Yield a function for requests to the Prefect server, with retries.

    It retries for about 16 s while the server's SQLite database is locked (503), and raises
    `httpx.HTTPStatusError` for an error response with a body.
    """
    url = f"{stack.prefect_url}/api"
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:

        def request(method: str, path: str, content: object) -> Any:
            for pause in (0.2, 0.5, 1, 2, 4, 8):  # as Prefect's own client does
                response = client.request(method, path, json=content)
                if response.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                    break
                time.sleep(pause)
            return response.raise_for_status().json() if response.content else None

        yield request


def _report_due(stack: Stack, say: Say) -> None:
    """Report the next due time of each schedule; raise Unscheduled with the server's last error."""
    with prefect_api(stack) as ask:
        try:
            schedules = wait_for_runs(ask)
        except Unscheduled as error:
            log = prefect_server(stack).log
            raise Unscheduled(f"{error}. {processes.last_error(log)}") from error
    say(table(schedules))


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt once; later signals are ignored, so that the clean-up finishes."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
