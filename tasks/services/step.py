"""The decorator of every task: retries while a service is away, and no cached results."""

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
"""Variable with the seconds that a task waits for a service that is away; 900 if it is not set."""

_DELAYS = [2, 5, 10, 20, 30, *[60] * 30]
"""Seconds before each retry, as many as the patience allows."""

_BUSY = (408, 429)  # Request Timeout and Too Many Requests


def step(function: Callable[P, R]) -> Task[P, R]:
    """Make a Prefect task of a function, with retries.

    It is retried for a quarter of an hour while a service is away or busy, and for no other error.
    Our own modules raise a ConnectionError then, Prefect's client errors of httpx. Its result is
    never taken from a cache, whatever the worker's settings: a task reads services, whose state
    changes.
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
    """Return True for a failure to connect, and for no other, for as long as the patience lasts."""
    # The delays so far, without the time that the attempts took.
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
