"""Look after the other runs: what went wrong is mended, and people are told."""

from prefect import flow
from prefect.client.schemas import State
from prefect.states import Completed

from tasks.runs.attempt import TimeLimit, in_time
from tasks.runs.turn import OVERTAKEN, take_turn
from tasks.services.s3 import DEFAULT_STORE
from tasks.watch.alarms import WATCHED
from tasks.watch.histories import notify_of_histories
from tasks.watch.messages import WATCH_FLOW
from tasks.watch.notifications import notify_people
from tasks.watch.recovery import recover_runs
from tasks.watch.schedules import restore_schedules


@flow(name=WATCH_FLOW, flow_run_name="look after {store}")
@in_time
def watch(store: str = DEFAULT_STORE, time_limit_minutes: TimeLimit = 60) -> State[object]:
    """Resume the runs that died, tell people what happened and what is wrong, mend schedules.

    Args:
        store: Where the messages that were sent are recorded.
        time_limit_minutes: A run that takes longer is ended, as Timed out.

    """
    resumed = recover_runs()
    if overtaken := take_turn({"dataset": None, "store": DEFAULT_STORE}):
        return Completed(name=OVERTAKEN, message=overtaken)
    done = [*resumed, *notify_people(store), *restore_schedules(store)]
    done += notify_of_histories(store)  # last: it is the one that needs MLflow
    return Completed(name=WATCHED, message="; ".join(done) or "nothing to do")
