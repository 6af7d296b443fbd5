"""The states that a flow run has been in, and what they say of its life."""

from collections.abc import Iterable
from datetime import datetime

from prefect.client.schemas.objects import State

GIVEN_UP = "Given up"
"""Name of the state, of type CRASHED, in which a run stays that was resumed often enough."""


def since_end(past: Iterable[State]) -> list[State]:
    """Return a run's states, in order, since it last ended other than by a death.

    What a person repeats begins anew; what is resumed after a death goes on.
    """
    ordered = sorted(past, key=lambda state: state.timestamp)
    ended = [
        place
        for place, state in enumerate(ordered)
        if state.name == GIVEN_UP or (state.is_final() and not state.is_crashed())
    ]
    return ordered[ended[-1] + 1 :] if ended else ordered


def since_running(past: Iterable[State]) -> list[State]:
    """Return a run's states, in order, since it last began or went on."""
    ordered = sorted(past, key=lambda state: state.timestamp)
    begun = [place for place, state in enumerate(ordered) if state.is_running()]
    return ordered[begun[-1] :] if begun else ordered


def began(past: Iterable[State]) -> datetime | None:
    """Return the time at which the present attempt began; None if it has not.

    A run that contradicts a false report of its death has another Running state, but no new
    attempt: nothing was scheduled in between.
    """
    ordered = sorted(past, key=lambda state: state.timestamp)
    scheduled = [place for place, state in enumerate(ordered) if state.is_scheduled()]
    attempt = ordered[scheduled[-1] :] if scheduled else ordered
    running = [state.timestamp for state in attempt if state.is_running()]
    return running[0] if running else None
