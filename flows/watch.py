"""Watch over the other runs: resume them, notify people, restore schedules."""

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
    """Resume the runs that died, notify people of events and faults, and restore schedules.

    Args:
        store: Address of the store with the record of the messages sent.
        time_limit_minutes: A run that takes longer is ended, as Timed out.

    """
    # Before the turn: a run that died must not wait for a pass that sends messages.
    resumed = recover_runs()
    if overtaken := take_turn({"dataset": None, "store": DEFAULT_STORE}):
        return Completed(name=OVERTAKEN, message=overtaken)
    done = [*resumed, *notify_people(store), *restore_schedules(store)]
    done += notify_of_histories(store)  # last: it is the one that needs MLflow
    return Completed(name=WATCHED, message="; ".join(done) or "nothing to do")
