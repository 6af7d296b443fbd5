"""Look after everything that runs while nobody does."""

from prefect import flow
from prefect.client.schemas import State
from prefect.states import Completed

from tasks.attempt import TimeLimit, in_time
from tasks.recovery import recover_runs


@flow(name="watch", flow_run_name="watch")
@in_time
def watch(time_limit_minutes: TimeLimit = 10) -> State[object]:
    """Resume the runs that died.

    It runs every few minutes, and at once after a run of ours has failed or crashed.

    Args:
        time_limit_minutes: A run that takes longer is ended, as Timed out.

    """
    done = recover_runs()
    return Completed(name="Watched", message="; ".join(done) or "nothing to do")
