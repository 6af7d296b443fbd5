"""Attempts at a flow run: each ends within its time limit, and only the newest acts for the run.

A run may be resumed while an earlier attempt is still alive, because the server or the network was
away for longer than the heartbeat allows. So each attempt reads the state of its run from the
server every few seconds, and acts on it:

    a newer attempt has begun, or is due      it ends its process and leaves the run's state alone
    the run was cancelled or ended            it ends its process
    the run is Crashed, the attempt is alive  it sets the run to Running again
"""

import faulthandler
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar, copy_context
from datetime import datetime, timedelta
from functools import wraps
from inspect import signature
from typing import Annotated, Literal, ParamSpec, TypeVar
from uuid import UUID

from prefect import get_run_logger, runtime
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.client.schemas.responses import SetStateStatus
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import Cancelled, Failed, Running
from pydantic import Field

from tasks.services.clock import server_time

P = ParamSpec("P")
R = TypeVar("R")

TimeLimit = Annotated[float, Field(gt=0, le=7 * 24 * 60)]
"""A time limit in minutes, at most a week."""

_POLL_SECONDS = 4.0
_CANCELLING_SECONDS = 60.0
"""A live worker has ended a cancelled run by then."""
_LAST_RESORT_SECONDS = 120.0
"""After the limit; the interpreter itself may hang, so that no thread of Python gets to run."""

_GUARD: ContextVar["_Guard | None"] = ContextVar("guard", default=None)
"""The guard of the attempt in this process; None before it begins."""

Order = Literal["go on", "say that it goes on", "end", "end as cancelled"]


def judge_attempt(run: FlowRun, number: int, now: datetime) -> Order:
    """Return the order for an attempt; `run` and `now` are the server's view of run and time."""
    state = run.state
    # The server counts each Running state: a higher count belongs to a newer attempt.
    if state is None or run.run_count > number:
        return "end"
    if state.is_cancelling():
        # Its worker kills the process. Without a worker, the attempt has to end itself.
        late = now - state.timestamp > timedelta(seconds=_CANCELLING_SECONDS)
        return "end as cancelled" if late else "go on"
    if state.is_crashed():
        return "say that it goes on"
    return "go on" if state.is_running() else "end"


def in_time(function: Callable[P, R]) -> Callable[P, R]:
    """Guard a flow as one attempt, with its parameter `time_limit_minutes` as the limit."""
    form = signature(function)

    @wraps(function)
    def guarded(*arguments: P.args, **parameters: P.kwargs) -> R:
        bound = form.bind(*arguments, **parameters)
        bound.apply_defaults()
        with attempt(bound.arguments["time_limit_minutes"]):
            return function(*arguments, **parameters)

    return guarded


@contextmanager
def attempt(limit_minutes: float = math.inf) -> Iterator[None]:
    """Guard the block; end the process at the time limit, or once the run is not its own.

    A run that exceeds its limit ends as Failed with the name "Timed out". A nested attempt sets the
    limit of the outer one, which counts from then on. In a process that was not started for the
    run, such as a test's, nothing is guarded.
    """
    # Prefect sets the variable in the process that it starts for a flow run.
    if os.environ.get("PREFECT__FLOW_RUN_ID") != str(runtime.flow_run.id):
        yield
        return
    if outer := _GUARD.get():
        outer.limit(limit_minutes)
        yield
        return
    guard = _Guard(limit_minutes)
    # The copied context carries Prefect's run context, which the thread's logger needs.
    thread = threading.Thread(target=copy_context().run, args=[guard.watch], daemon=True)
    thread.start()
    token = _GUARD.set(guard)
    try:
        yield
    finally:
        _GUARD.reset(token)
        guard.over.set()
        thread.join(_POLL_SECONDS)
        faulthandler.cancel_dump_traceback_later()


class _Guard:
    """The checks of an attempt, made in a thread beside it."""

    def __init__(self, limit_minutes: float) -> None:
        self._run_id = UUID(str(runtime.flow_run.id))
        self._number = int(runtime.flow_run.run_count)
        self._main = threading.main_thread()
        self._logger = get_run_logger()
        self.over = threading.Event()
        self.limit(limit_minutes)

    def limit(self, minutes: float) -> None:
        """Set the time limit, in minutes from now."""
        self._limit = minutes
        self._ends = time.monotonic() + 60 * minutes
        if math.isfinite(minutes):
            # faulthandler's own thread needs no interpreter lock, so a hang cannot stop it.
            faulthandler.dump_traceback_later(60 * minutes + _LAST_RESORT_SECONDS, exit=True)

    def watch(self) -> None:
        """Check the run until the work is over; at the next poll if the server is away."""
        # This loop is the retry. Those of the client would delay the check of the time limit.
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
            while not self.over.is_set():
                try:
                    with get_client(sync_client=True) as prefect:
                        self._check_run(prefect)
                except ObjectNotFound:  # the run was deleted
                    _end_process()
                except Exception as error:  # noqa: BLE001 - without a guard nothing ends the run
                    self._logger.debug("the Prefect server cannot be asked now: %r", error)
                # `_check_run` ends a run at its limit, with a message. One poll later, the server
                # must be away: the worker reports the end, or the missing heartbeat does.
                if time.monotonic() > self._ends + _POLL_SECONDS:
                    _end_process()
                self.over.wait(_POLL_SECONDS)

    def _check_run(self, prefect: SyncPrefectClient) -> None:
        run = prefect.read_flow_run(self._run_id)
        order = judge_attempt(run, self._number, server_time(prefect))
        # The work may have ended meanwhile: the state that the flow returned must stand.
        if self.over.is_set():
            return
        if order == "go on" and time.monotonic() > self._ends:
            self._time_out(prefect)
        elif order == "say that it goes on":
            message = f"Goes on: a late report said of it: {run.state and run.state.message}"
            running: State = Running(message=message)
            response = prefect.set_flow_run_state(self._run_id, running, force=True)
            if response.status == SetStateStatus.ACCEPT:
                self._number += 1  # the server counts this Running state too
        elif order == "end as cancelled":
            cancelled: State = Cancelled(message="Cancelled; no worker was there to end it.")
            prefect.set_flow_run_state(self._run_id, cancelled, force=True)
            _end_process()
        elif order == "end":
            self._logger.warning("attempt %d ends: the run is not its own now", self._number)
            _end_process()

    def _time_out(self, prefect: SyncPrefectClient) -> None:
        frame = sys._current_frames().get(self._main.ident or 0)  # noqa: SLF001 - documented
        stack = "".join(traceback.format_stack(frame)) if frame else "nowhere to be seen"
        self._logger.error("the time is up; this run was at\n%s", stack)
        message = (
            f"It ran for more than {self._limit:g} minutes, its limit, and was ended; the log says "
            "where it was. If it only needed longer, raise the parameter time_limit_minutes."
        )
        failed: State = Failed(name="Timed out", message=message)
        prefect.set_flow_run_state(self._run_id, failed, force=True)
        _end_process()


def _end_process() -> None:
    """Kill this process and its children at once, so that none of its work goes on.

    SIGKILL runs no handler of Prefect's engine, which would set a state for the run.
    """
    import psutil

    try:
        # Children first, such as the workers of torchrun: they would outlive their parent.
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):  # it has ended already
                child.kill()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os.kill(os.getpid(), signal.SIGKILL)
