"""Trigger flow runs by the command line that a person would type, and print their progress."""

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

WATCHING_ENDS = "Stopped watching; the run goes on. `make down` stops everything."


def errors_as_sentences(work: Callable[[], int], stopped: str = "Stopped.") -> int:
    """Return the exit code of `work`; print a StackError as a sentence and return 1.

    Ctrl-C prints `stopped` and returns 130.
    """
    try:
        return work()
    except StackError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{stopped}")
        return 130


@contextmanager
def connect_to_prefect(*, local: bool = False) -> Iterator[SyncPrefectClient]:
    """Connect to the server of `PREFECT_API_URL`; to the local stack if unset, or if `local`.

    With the local stack's server its MLflow and its S3 are used as well, also where the variable
    points to it: the stack's variables are set in `os.environ`. With any other server the caller's
    own variables apply. Raises StackError if the server does not respond.
    """
    stack = Stack.configured()
    if local or is_local(os.environ.get("PREFECT_API_URL"), stack):
        os.environ |= environment(stack)
    elif missing := missing_services(os.environ):
        url = without_credentials(os.environ["PREFECT_API_URL"])
        print(f"{url} is not the local stack's. {missing}")
    # Passed explicitly: Prefect reads the variable at its import, which is before this call.
    url = os.environ["PREFECT_API_URL"]
    with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as prefect:
        if fault := prefect.api_healthcheck():
            raise StackError(
                f"the Prefect server does not answer at {without_credentials(url)} ({fault}); "
                "start the local one with `make up`, or correct PREFECT_API_URL"
            )
        yield prefect


def is_local(prefect_url: str | None, stack: Stack) -> bool:
    """Return True if a PREFECT_API_URL points to the local stack, as one that is not set does."""
    local = urlsplit(stack.prefect_url)
    given = urlsplit(prefect_url or stack.prefect_url)
    return given.port == local.port and given.hostname in {local.hostname, "localhost"}


def missing_services(variables: Mapping[str, str]) -> str | None:
    """Return a sentence on the variables missing for another Prefect server; None if none is.

    S3 counts as configured by any variable of AWS, or by a folder ~/.aws.
    """
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
    """Print and run `prefect deployment run`; return the flow run that it created.

    `params` are NAME=VALUE. Raises StackError with the command's output if it fails.
    """
    arguments = ["deployment", "run", deployment]
    arguments += [argument for param in params for argument in ("--param", param)]
    print(f"\n$ prefect {shlex.join(arguments)}", flush=True)
    # A tag of its own identifies the new run on the server.
    tag = f"typed-{uuid4().hex[:8]}"
    command = [sys.executable, "-m", "prefect", *arguments, "--tag", tag]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise StackError(f"the run could not be made:\n{done.stdout}{done.stderr}")
    (run,) = prefect.read_flow_runs(
        flow_run_filter=FlowRunFilter(tags=FlowRunFilterTags(all_=[tag]))
    )
    return run


def watch(prefect: SyncPrefectClient, run: FlowRun) -> FlowRun:
    """Wait for the run's end and print each stage as it begins; return the final run."""
    began = time.monotonic()
    printed: set[str] = set()
    while not (run.state and run.state.is_final()):
        for stage in stages(prefect, run):
            if stage.name not in printed:
                printed.add(stage.name)
                print(f"{time.monotonic() - began:6.1f} s  {title(stage)}", flush=True)
        time.sleep(0.5)
        run = prefect.read_flow_run(run.id)
    return run


def stages(prefect: SyncPrefectClient, run: FlowRun) -> list[TaskRun]:
    """Return the task runs of a flow run, in order of their expected start."""
    return prefect.read_task_runs(
        flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run.id])),
        sort=TaskRunSort.EXPECTED_START_TIME_ASC,
    )


def title(stage: TaskRun) -> str:
    """Return a stage's title: its name without Prefect's suffix, in plain words."""
    return stage.name.rsplit("-", 1)[0].replace("_", " ")


def print_verdict(run: FlowRun) -> None:
    """Print the final state of a run, and its reason."""
    assert run.state
    print(f"\n{str(run.state.name).upper()}: {run.state.message}\n")
