"""Make the runs that a person would make, and tell what they do."""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, FlowRunFilterTags
from prefect.client.schemas.objects import FlowRun, TaskRun
from prefect.client.schemas.sorting import TaskRunSort
from prefect.settings import PREFECT_API_URL, temporary_settings

from deployments.stack import PROJECT, Stack, StackError, environment
from tasks.services.addresses import without_credentials


def errors_as_sentences(work: Callable[[], int]) -> int:
    """Return the exit code of `work`; tell a fault of the stack in a sentence."""
    try:
        return work()
    except StackError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped watching; the run goes on. `make down` stops everything.")
        return 130


@contextmanager
def connect_to_prefect(*, local: bool = False) -> Iterator[SyncPrefectClient]:
    """Speak to the server that `PREFECT_API_URL` names, else, or if `local`, to the local stack.

    The local stack comes whole: its MLflow and its S3 are used as well, also where the variable
    names it. Elsewhere the caller's own variables hold. Raises StackError if it does not answer.
    """
    stack = Stack.configured()
    if local or is_local(os.environ.get("PREFECT_API_URL"), stack):
        os.environ |= environment(stack)
    elif missing := missing_services(os.environ):
        url = without_credentials(os.environ["PREFECT_API_URL"])
        print(f"{url} is not the local stack's. {missing}")
    url = os.environ["PREFECT_API_URL"]  # which Prefect has read already if it was imported before
    with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as prefect:
        if fault := prefect.api_healthcheck():
            raise StackError(
                f"the Prefect server does not answer at {without_credentials(url)} ({fault}); "
                "start the local one with `make up`, or correct PREFECT_API_URL"
            )
        yield prefect


def is_local(prefect_url: str | None, stack: Stack) -> bool:
    """Tell whether a PREFECT_API_URL means the local stack; so does one that is not set."""
    local = urlsplit(stack.prefect_url)
    meant = urlsplit(prefect_url or stack.prefect_url)
    return meant.port == local.port and meant.hostname in {local.hostname, "localhost"}


def missing_services(variables: Mapping[str, str]) -> str | None:
    """Return a sentence on what is needed besides another Prefect server, and is not named."""
    named = {name.split("_")[0] for name in variables}
    missing = []
    if "MLFLOW_TRACKING_URI" not in variables:
        missing.append("MLFLOW_TRACKING_URI")
    if "AWS" not in named and not Path("~/.aws").expanduser().exists():
        missing.append("AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile")
    return (
        f"Set {' and '.join(missing)} as well, of the services that belong to it."
        if missing
        else None
    )


def trigger(prefect: SyncPrefectClient, deployment: str, params: list[str]) -> FlowRun:
    """Type the command that a person would type, and find the run that it made."""
    spoken = ["deployment", "run", deployment]
    spoken += [word for param in params for word in ("--param", param)]
    print(f"\n$ prefect {shlex.join(spoken)}", flush=True)
    tag = f"typed-{uuid4().hex[:8]}"
    command = [sys.executable, "-m", "prefect", *spoken, "--tag", tag]
    typed = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    if typed.returncode:
        raise StackError(f"the run could not be made:\n{typed.stdout}{typed.stderr}")
    (run,) = prefect.read_flow_runs(
        flow_run_filter=FlowRunFilter(tags=FlowRunFilterTags(all_=[tag]))
    )
    return run


def watch(prefect: SyncPrefectClient, run: FlowRun) -> FlowRun:
    """Wait for the run's end, telling each stage as it begins."""
    began, told = time.monotonic(), set[str]()
    while not (run.state and run.state.is_final()):
        for stage in stages(prefect, run):
            if stage.name not in told:
                told.add(stage.name)
                print(f"{time.monotonic() - began:6.1f} s  {title(stage)}", flush=True)
        time.sleep(0.5)
        run = prefect.read_flow_run(run.id)
    return run


def stages(prefect: SyncPrefectClient, run: FlowRun) -> list[TaskRun]:
    """Return what the run has begun, in order."""
    return prefect.read_task_runs(
        flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run.id])),
        sort=TaskRunSort.EXPECTED_START_TIME_ASC,
    )


def title(stage: TaskRun) -> str:
    """Return a stage's name as a person would write it."""
    return stage.name.rsplit("-", 1)[0].replace("_", " ")


def print_verdict(run: FlowRun) -> None:
    """Print the state in which the run ended, and why."""
    assert run.state
    print(f"\n{str(run.state.name).upper()}: {run.state.message}\n")
