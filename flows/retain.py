"""Remove checkpoints and artifacts that nothing depends on any more."""

from prefect import flow
from prefect.client.schemas import State
from prefect.states import Completed

from tasks.retain import RetentionPolicy, plan_removals, remove, report_removals
from tasks.runs.attempt import TimeLimit, in_time
from tasks.runs.outcome import once
from tasks.services.s3 import DEFAULT_STORE


@flow(name="retain", flow_run_name="what {store} no longer needs")
@once
@in_time
def retain(
    policy: RetentionPolicy = RetentionPolicy(),
    *,
    dry_run: bool = True,
    store: str = DEFAULT_STORE,
    time_limit_minutes: TimeLimit = 60,
) -> State[object]:
    """Remove checkpoints of ended runs and artifacts of versions that lost; list them.

    Args:
        policy: Days for which checkpoints and rejected artifacts are kept.
        dry_run: List the removals, and remove nothing.
        store: Address of data and records.
        time_limit_minutes: A run that takes longer is ended, as Timed out.

    """
    removals = plan_removals(policy, store)
    if not dry_run:
        removals = remove(removals, store)
    report_removals(removals, dry_run=dry_run)
    summary = "; ".join(removal.what for removal in removals)
    if not summary:
        return Completed(name="Nothing to remove", message="nothing is old enough")
    name = "Nothing removed, dry run" if dry_run else "Removed"
    return Completed(name=name, message=summary)
