"""Retrain once as the schedule would, and show what happened.

`make demo` starts the local stack first; `make run` uses what `PREFECT_API_URL` names, or the local
stack that is up.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from uuid import uuid4

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, FlowRunFilterTags
from prefect.client.schemas.objects import FlowRun, TaskRun
from prefect.client.schemas.sorting import TaskRunSort
from prefect.utilities.urls import url_for

from deployments.stack import PROJECT, Stack, StackError, environment, start
from tasks.records import RunSummary
from tasks.storage import DEFAULT_STORE, Store

COMMAND = ["deployment", "run", "train/weekly"]


def main() -> int:
    """Return 0 only if the run completed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--start", action="store_true", help="start the local stack first")
    parser.add_argument("--param", action="append", default=[], help="NAME=VALUE, for the flow")
    words = parser.parse_args()
    stack = Stack.configured()
    try:
        if words.start:
            start(stack, deploy=PROJECT / "deployments" / "prefect.yaml")
        if words.start or "PREFECT_API_URL" not in os.environ:
            os.environ |= environment(stack)
        with get_client(sync_client=True) as prefect:
            _demand_an_answer(prefect)
            run = _watch(prefect, _trigger(prefect, words.param))
            _show(prefect, run)
    except StackError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped watching; the run goes on. `make down` stops everything.")
        return 130
    if words.start:
        print("\nThe stack stays up. Stop it with: make down")
    return 0 if run.state and run.state.is_completed() else 1


def _demand_an_answer(prefect: SyncPrefectClient) -> None:
    if fault := prefect.api_healthcheck():
        raise StackError(
            f"the Prefect server does not answer at {os.environ['PREFECT_API_URL']} ({fault}); "
            "start the local one with `make up`, or correct PREFECT_API_URL"
        )


def _trigger(prefect: SyncPrefectClient, params: list[str]) -> FlowRun:
    """Type the command that a person would type, and find the run that it made."""
    spoken = [*COMMAND, *(word for param in params for word in ("--param", param))]
    print(f"\n$ prefect {shlex.join(spoken)}")
    tag = f"demo-{uuid4().hex[:8]}"
    command = [sys.executable, "-m", "prefect", *spoken, "--tag", tag]
    typed = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    if typed.returncode:
        raise StackError(f"the run could not be made:\n{typed.stdout}{typed.stderr}")
    (run,) = prefect.read_flow_runs(
        flow_run_filter=FlowRunFilter(tags=FlowRunFilterTags(all_=[tag]))
    )
    return run


def _watch(prefect: SyncPrefectClient, run: FlowRun) -> FlowRun:
    """Wait for the run's end, telling each stage as it begins."""
    began, told = time.monotonic(), set[str]()
    while not (run.state and run.state.is_final()):
        for stage in _stages(prefect, run):
            if stage.name not in told:
                told.add(stage.name)
                print(f"{time.monotonic() - began:6.1f} s  {_title(stage)}", flush=True)
        time.sleep(0.5)
        run = prefect.read_flow_run(run.id)
    return run


def _stages(prefect: SyncPrefectClient, run: FlowRun) -> list[TaskRun]:
    return prefect.read_task_runs(
        flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run.id])),
        sort=TaskRunSort.EXPECTED_START_TIME_ASC,
    )


def _show(prefect: SyncPrefectClient, run: FlowRun) -> None:
    """Print verdict, figures, seconds per stage and addresses."""
    assert run.state
    print(f"\n{str(run.state.name).upper()}: {run.state.message}\n")
    stages = [stage for stage in _stages(prefect, run) if stage.start_time]
    for stage in stages:
        print(f"  {_title(stage):<20} {stage.total_run_time.total_seconds():6.1f} s")
    print(f"  {'the whole run':<20} {run.total_run_time.total_seconds():6.1f} s\n")
    try:
        content = Store(DEFAULT_STORE).get(f"runs/{run.id}/summary.json")
    except FileNotFoundError:
        print("The run ended before it could report; its log says why:", url_for(run))
        return
    summary = RunSummary.model_validate_json(content)
    if summary.dataset == "digits" and run.parameters.get("dataset") == "auto":
        print("  MNIST COULD NOT BE HAD: this run used the embedded sample of 1,797 digits.")
        print("  To use MNIST set MNIST_MIRROR, then `make down` and `make demo`.\n")
    figures = {
        "data set": summary.dataset,
        "candidate": _figure(summary.version, summary.accuracy),
        "champion before": _figure(summary.champion_before, summary.champion_accuracy),
        "champion now": summary.champion or "none",
    }
    for name, value in (figures | summary.links).items():
        print(f"  {name:<20} {value}")


def _title(stage: TaskRun) -> str:
    return stage.name.rsplit("-", 1)[0].replace("_", " ")


def _figure(version: str | None, accuracy: float | None) -> str:
    return f"{version}, accuracy {accuracy:.2%}" if version and accuracy is not None else "none"


if __name__ == "__main__":
    sys.exit(main())
