"""The record of a message on its way to its recipients, and the rules for trying again.

taken       done
late        sent, and not answered: it may have arrived, so it is repeated three times only
refused     answered, and not taken: after three times a short form is sent instead
unreachable no connection, or a service that is busy: tried at every look for a week
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from pydantic import BaseModel

from tasks.watch.messages import Message

KEPT = timedelta(days=7)
"""How long a message is tried for a recipient that cannot be reached."""

_LATE_PAUSES = (timedelta(minutes=15), timedelta(hours=1), timedelta(hours=4))
_FIRST_PAUSE = timedelta(minutes=4)
"""After the first refusal, so that the next look, five minutes later, tries again."""
_REFUSALS = 10
"""The pauses double: the last try is a day and a half after the first."""
_LONG_FORMS = 3


@dataclass(frozen=True)
class Failure:
    """Why a recipient did not take a message."""

    kind: Literal["late", "refused", "unreachable"]
    reason: str
    """In words of ours, without an address."""

    @property
    def blocks(self) -> bool:
        """Whether another message would fare no better now."""
        return self.kind != "refused"

    def __str__(self) -> str:
        return self.reason


class Tries(BaseModel, frozen=True):
    """How often a recipient was given a message that it has not taken."""

    refused: int = 0
    late: int = 0
    due: datetime | None = None
    """When it is given it again; at the next look if None."""

    @property
    def short(self) -> bool:
        """Whether the short form is due: the long one may be too long for it."""
        return self.refused >= _LONG_FORMS


class Delivery(BaseModel, frozen=True):
    """A message and how far it has come."""

    format: int = 1
    message: Message
    sent: datetime
    """When it was sent first."""
    taken: list[str]
    owed: list[str]
    """Blocks that failed, or had no turn yet, and are tried again."""
    tries: dict[str, Tries] = {}
    given_up: dict[str, str] = {}
    """Blocks that are not tried again, and why."""

    def due(self, now: datetime) -> list[str]:
        """Return the blocks that are given the message now."""
        known = {name: self.tries.get(name, Tries()) for name in self.owed}
        return [name for name, tries in known.items() if not tries.due or tries.due <= now]


def settle(before: Delivery, results: Mapping[str, Failure | None], now: datetime) -> Delivery:
    """Return the delivery after blocks took it (None) or failed."""
    tries, given_up = dict(before.tries), dict(before.given_up)
    for name, failure in results.items():
        so_far = tries.pop(name, Tries())
        following = try_again(so_far, failure, now - before.sent, now) if failure else None
        if following:
            tries[name] = following
        elif failure:
            given_up[name] = failure.reason
    taken = [*before.taken, *(name for name, failure in results.items() if failure is None)]
    owed = [name for name in before.owed if name not in taken and name not in given_up]
    changed = {"taken": taken, "owed": owed, "tries": tries, "given_up": given_up}
    return before.model_copy(update=changed)


def try_again(tries: Tries, failure: Failure, age: timedelta, now: datetime) -> Tries | None:
    """Return when a block that failed is tried again; None if it is not.

    `age` is the time since the message was sent first.
    """
    if failure.kind == "unreachable":
        return None if age > KEPT else tries.model_copy(update={"due": None})
    if failure.kind == "late":
        late = tries.late + 1
        if late > len(_LATE_PAUSES):
            return None
        return tries.model_copy(update={"late": late, "due": now + _LATE_PAUSES[late - 1]})
    refused = tries.refused + 1
    if refused >= _REFUSALS:
        return None
    pause = _FIRST_PAUSE * 2 ** (refused - 1)
    return tries.model_copy(update={"refused": refused, "due": now + pause})
