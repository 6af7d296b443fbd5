"""Retrain once as the schedule would, and show what happened.

`make demo` starts the local stack first; `make run` uses what `PREFECT_API_URL` names, or the local
stack that is up.
"""

import argparse
import sys

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.utilities.urls import url_for

from deployments.stack import PROJECT, Stack, start
from deployments.watch import (
    WATCHING_ENDS,
    connect_to_prefect,
    errors_as_sentences,
    print_verdict,
    stages,
    title,
    trigger,
    watch,
)
from tasks import keys
from tasks.records import RunSummary
from tasks.services.markdown import percent
from tasks.services.s3 import Store, default_store


def main() -> int:
    """Run the command line; return 0 only if the run completed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--start", action="store_true", help="start the local stack first")
    parser.add_argument("--param", action="append", default=[], help="NAME=VALUE, for the flow")
    options = parser.parse_args()
    return errors_as_sentences(
        lambda: _retrain(options.param, start_stack=options.start), WATCHING_ENDS
    )


def _retrain(params: list[str], *, start_stack: bool) -> int:
    if start_stack:
        start(Stack.configured(), deploy=PROJECT / "deployments" / "prefect.yaml")
    with connect_to_prefect(local=start_stack) as prefect:
        run = watch(prefect, trigger(prefect, "train/weekly", params))
        _print_summary(prefect, run)
    if start_stack:
        print("\nThe stack stays up. Stop it with: make down")
    return 0 if run.state and run.state.is_completed() else 1


def _print_summary(prefect: SyncPrefectClient, run: FlowRun) -> None:
    """Print verdict, seconds per stage, figures and links of a finished run."""
    print_verdict(run)
    for stage in stages(prefect, run):
        if stage.start_time:  # a stage that never started has no duration
            print(f"  {title(stage):<20} {stage.total_run_time.total_seconds():6.1f} s")
    print(f"  {'the whole run':<20} {run.total_run_time.total_seconds():6.1f} s\n")
    try:
        content = Store(default_store()).get(keys.record(run.id, "summary"))
    except FileNotFoundError:
        print("The run ended before it could report; its log says why:", url_for(run))
        return
    summary = RunSummary.model_validate_json(content)
    # The sample is a fallback only where the data set was left to the run.
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


def _figure(version: str | None, accuracy: float | None) -> str:
    return (
        f"{version}, accuracy {percent(accuracy)}" if version and accuracy is not None else "none"
    )


if __name__ == "__main__":
    sys.exit(main())
