"""Delivery of a message to its recipients: its record and the rules for retries.

taken        delivered
late         sent, but not answered: it may have arrived, so it is retried three times only
refused      answered, but not taken: after three times a short form is sent instead
unreachable  no connection, or a busy service: retried in each pass for a week
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from pydantic import BaseModel, Field

from mnist_cnn.record import Record
from tasks.watch.messages import Message

KEPT = timedelta(days=7)
"""Time for which a message is retried for a recipient that cannot be reached."""

_LATE_PAUSES = (timedelta(minutes=15), timedelta(hours=1), timedelta(hours=4))
_FIRST_PAUSE = timedelta(minutes=4)
"""After the first refusal; a pass comes every two minutes."""
_REFUSALS = 10
"""The pauses double: the last attempt is a day and a half after the first."""
_LONG_FORMS = 3
"""Refusals of the long form, after which the short form is sent."""


@dataclass(frozen=True)
class Failure:
    """Reason for which a recipient did not take a message."""

    kind: Literal["late", "refused", "unreachable"]
    reason: str
    """In our own words, without an address."""

    @property
    def blocks(self) -> bool:
        """True if any other message would fail as well now."""
        return self.kind != "refused"

    def __str__(self) -> str:
        return self.reason


class Tries(BaseModel, frozen=True):
    """Failed attempts to deliver a message to one recipient."""

    refused: int = 0
    late: int = 0
    due: datetime | None = None
    """Time from which on it is retried; None for the next pass."""

    @property
    def short(self) -> bool:
        """True if the short form is due: the long one may be too long for the recipient."""
        return self.refused >= _LONG_FORMS


class Delivery(Record):
    """A message and the state of its delivery to each block."""

    message: Message
    sent: datetime
    """Time of the first attempt."""
    taken: list[str]
    """Blocks that took it."""
    owed: list[str]
    """Blocks that failed, or were not tried yet: they are tried again."""
    tries: dict[str, Tries] = Field({})
    given_up: dict[str, str] = Field({})
    """Blocks that are not tried again, with the reason."""

    def due(self, now: datetime) -> list[str]:
        """Return the blocks that are to be tried now."""
        known = {name: self.tries.get(name, Tries()) for name in self.owed}
        return [name for name, tries in known.items() if not tries.due or tries.due <= now]


def settle(before: Delivery, results: Mapping[str, Failure | None], now: datetime) -> Delivery:
    """Return the delivery after an attempt; the result of a block that took the message is None."""
    tries = dict(before.tries)
    given_up = dict(before.given_up)
    for name, failure in results.items():
        so_far = tries.pop(name, Tries())
        following = try_again(so_far, failure, now - before.sent, now) if failure else None
        if following:
            tries[name] = following
        elif failure:  # no attempt is left
            given_up[name] = failure.reason
    taken = [*before.taken, *(name for name, failure in results.items() if failure is None)]
    owed = [name for name in before.owed if name not in taken and name not in given_up]
    changed = {"taken": taken, "owed": owed, "tries": tries, "given_up": given_up}
    return before.model_copy(update=changed)


def try_again(tries: Tries, failure: Failure, age: timedelta, now: datetime) -> Tries | None:
    """Return the tries of a block after one more failure; None if it is not to be tried again.

    `age` is the time since the first attempt.
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
