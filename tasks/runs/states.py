"""The states that a flow run has been in: its last end, its last start, its present attempt."""

from collections.abc import Iterable
from datetime import datetime

from prefect.client.schemas.objects import State

GIVEN_UP = "Given up"
"""Name of the state, of type CRASHED, in which a run stays that has no resume left."""


def since_end(past: Iterable[State]) -> list[State]:
    """Return a run's states, in order, after its last end.

    A death is an end only as `GIVEN_UP`: a run that is resumed after a death continues, one that a
    person repeats starts again.
    """
    ordered = sorted(past, key=lambda state: state.timestamp)
    ended = [
        index
        for index, state in enumerate(ordered)
        if state.name == GIVEN_UP or (state.is_final() and not state.is_crashed())
    ]
    return ordered[ended[-1] + 1 :] if ended else ordered


def since_running(past: Iterable[State]) -> list[State]:
    """Return a run's states, in order, from its last Running state on; all of them without one."""
    ordered = sorted(past, key=lambda state: state.timestamp)
    begun = [index for index, state in enumerate(ordered) if state.is_running()]
    return ordered[begun[-1] :] if begun else ordered


def began(past: Iterable[State]) -> datetime | None:
    """Return the start of the present attempt; None if it has not begun.

    A run that contradicts a false report of its death gets another Running state, but no new
    attempt: there is no Scheduled state in between.
    """
    ordered = sorted(past, key=lambda state: state.timestamp)
    scheduled = [index for index, state in enumerate(ordered) if state.is_scheduled()]
    attempt = ordered[scheduled[-1] :] if scheduled else ordered
    running = [state.timestamp for state in attempt if state.is_running()]
    return running[0] if running else None
