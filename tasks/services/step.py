"""The decorator of every task: patient with services that are away, never answered from a cache."""

import os
from collections.abc import Callable
from itertools import accumulate
from json import JSONDecodeError
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from prefect import Task, task
from prefect.cache_policies import NO_CACHE

if TYPE_CHECKING:
    from prefect.client.schemas import State
    from prefect.client.schemas.objects import TaskRun

P = ParamSpec("P")
R = TypeVar("R")

PATIENCE = "RETRAINING_PATIENCE_SECONDS"
"""The variable that says how long a task waits for a service that is away; 900 if it is not set."""

_DELAYS = [2, 5, 10, 20, 30, *[60] * 30]
"""Seconds before each repeat, as many as patience allows."""

_BUSY = (408, 429)


def step(function: Callable[P, R]) -> Task[P, R]:
    """Make a task of a function.

    It is repeated for a quarter of an hour while a service is away or busy, which our own modules
    tell by a ConnectionError and Prefect's client by errors of httpx, and for no other error. Its
    result is never taken from a cache, whatever the worker's settings say: tasks ask the world,
    which changes.
    """
    return task(
        retries=len(_DELAYS),
        retry_delay_seconds=[float(delay) for delay in _DELAYS],
        retry_condition_fn=worth_another_try,
        retry_jitter_factor=0.2,
        cache_policy=NO_CACHE,
        persist_result=False,
    )(function)


def worth_another_try(_task: object, run: "TaskRun", state: "State[object]") -> bool:
    """Tell Prefect to retry what failed to connect, and nothing else, for as long as patience."""
    waited = [0, *accumulate(_DELAYS)][min(run.run_count - 1, len(_DELAYS))]
    patient = waited < float(os.environ.get(PATIENCE) or 900)
    return patient and _is_away(state.result(raise_on_failure=False))


def _is_away(error: object) -> bool:
    import httpx

    if isinstance(error, httpx.HTTPStatusError):
        code = error.response.status_code
        return code >= httpx.codes.INTERNAL_SERVER_ERROR or code in _BUSY
    # A login page or a maintenance page with status 200, where Prefect's client expects JSON.
    return isinstance(error, ConnectionError | httpx.TransportError | JSONDecodeError)
