"""A message on its way: who is tried again, when, how often, and in which form."""

from datetime import UTC, datetime, timedelta
from itertools import pairwise

import httpx
import pytest
from prefect.blocks.abstract import NotificationError

from tasks.watch.delivery import Delivery, Failure, Tries, settle, try_again
from tasks.watch.messages import Message
from tasks.watch.notifications import begin, classify

NOW = datetime(2026, 11, 23, 3, 30, tzinfo=UTC)
LOOK = timedelta(minutes=5)
MESSAGE = Message(key="a", subject="Failed: a", body="why", severity="failure", facts={})
LATE = Failure("late", "it did not answer")
REFUSED = Failure("refused", "it answered 413")
AWAY = Failure("unreachable", "it could not be reached")


def delivery() -> Delivery:
    return Delivery(message=MESSAGE, sent=NOW, taken=[], owed=["sms", "team"])


def attempts(failure: Failure, *, days: float) -> list[tuple[timedelta, bool]]:
    """Look every five minutes, with one recipient that fails; return when, and if short, it was."""
    made = []
    each = Delivery(message=MESSAGE, sent=NOW, taken=[], owed=["sms"])
    for number in range(int(timedelta(days=days) / LOOK)):
        now = NOW + number * LOOK
        if each.due(now):
            made.append((now - NOW, each.tries.get("sms", Tries()).short))
            each = settle(each, {"sms": failure}, now)
    return made


def test_a_message_that_nobody_took_is_owed_to_everybody() -> None:
    after = settle(delivery(), {"sms": REFUSED, "team": AWAY}, NOW)
    assert (after.taken, after.owed) == ([], ["sms", "team"])
    nobody_had_a_turn = settle(delivery(), {}, NOW)
    assert nobody_had_a_turn == delivery()


def test_who_took_it_is_owed_nothing() -> None:
    after = settle(delivery(), {"sms": REFUSED, "team": None}, NOW)
    assert (after.taken, after.owed) == (["team"], ["sms"])
    assert settle(after, {"sms": None}, NOW).owed == []


def test_a_refused_message_is_tried_at_growing_pauses_first_whole_then_short() -> None:
    made = attempts(REFUSED, days=7)
    assert [short for _, short in made] == [False] * 3 + [True] * 7
    pauses = [after - before for (before, _), (after, _) in pairwise(made)]
    assert pauses == sorted(pauses)
    assert made[1][0] == LOOK
    assert made[3][0] <= timedelta(minutes=35)  # the short form comes soon
    assert timedelta(days=1) < made[-1][0] < timedelta(days=3)


def test_a_message_that_may_have_arrived_is_repeated_three_times_at_growing_pauses() -> None:
    minutes = [at / timedelta(minutes=1) for at, _ in attempts(LATE, days=7)]
    assert minutes == [0, 15, 75, 315]


def test_who_cannot_be_reached_is_tried_at_every_look_for_a_week() -> None:
    made = attempts(AWAY, days=9)
    assert made[1][0] == LOOK
    assert timedelta(days=7) <= made[-1][0] <= timedelta(days=7) + LOOK


def test_a_week_without_a_look_costs_nobody_the_last_try() -> None:
    before = settle(delivery(), {"sms": AWAY, "team": None}, NOW)
    later = NOW + timedelta(days=20)
    assert before.due(later) == ["sms"]
    assert settle(before, {"sms": AWAY}, later).given_up == {"sms": "it could not be reached"}


def test_why_a_recipient_was_given_up_is_on_record() -> None:
    each = delivery()
    for _ in range(4):
        each = settle(each, {"sms": LATE, "team": None}, NOW)
    assert each.given_up == {"sms": "it did not answer"}
    assert each.owed == []


def test_a_busy_service_costs_a_message_none_of_its_tries() -> None:
    assert try_again(Tries(refused=9), AWAY, timedelta(), NOW) == Tries(refused=9)


def test_only_who_refuses_gets_the_next_message_of_a_pass() -> None:
    assert [failure.blocks for failure in (LATE, AWAY, REFUSED)] == [True, True, False]


def test_a_record_of_an_earlier_version_can_be_read() -> None:
    stored = (
        '{"format": 1, "message": {"key": "a", "subject": "s", "body": "b", "severity": "info", '
        '"facts": {}}, "sent": "2026-11-23T03:30:00Z", "taken": ["x"], "owed": ["y"]}'
    )
    assert Delivery.model_validate_json(stored).due(NOW) == ["y"]


REQUEST = httpx.Request("POST", "https://example.org")


def status(number: int) -> httpx.HTTPStatusError:
    return httpx.HTTPStatusError("", request=REQUEST, response=httpx.Response(number))


@pytest.mark.parametrize(
    ("error", "debug", "kind"),
    [
        (status(413), "", "refused"),
        (status(500), "", "refused"),
        (status(429), "", "unreachable"),
        (status(503), "", "unreachable"),
        (httpx.ConnectError(""), "", "unreachable"),
        (httpx.ConnectTimeout(""), "", "unreachable"),
        (httpx.ReadTimeout(""), "", "late"),
        (httpx.RemoteProtocolError(""), "", "late"),
        (ValueError("of a block"), "", "refused"),
        (NotificationError("Failed to send JSON POST: Bad, error=400."), "", "refused"),
        (NotificationError("Failed to send JSON POST: Busy, error=503."), "", "unreachable"),
        (NotificationError("A Connection error occurred"), "Read timed out.", "late"),
        (NotificationError("A Connection error occurred"), "('Connection aborted.', …)", "late"),
        (NotificationError("A Connection error occurred"), "Max retries exceeded", "unreachable"),
        (NotificationError("Connection error while submitting"), "timed out", "unreachable"),
        (NotificationError("Connection error while submitting"), "(552, b'long')", "refused"),
        (
            NotificationError("Connection error while submitting"),
            "Connection unexpectedly closed: timed out",
            "late",
        ),
        (NotificationError("The message is too long"), "", "refused"),
    ],
)
def test_a_failure_is_late_refused_or_unreachable(error: Exception, debug: str, kind: str) -> None:
    assert classify(error, debug).kind == kind


@pytest.mark.parametrize(
    ("last", "first", "since"),
    [
        (None, 90, 2),  # the first look of all
        (None, 1, 1),  # and nobody is told of what was before there was somebody to tell
        (0.01, 90, 2),
        (3, 90, 3),  # a weekend with the stack down
        (30, 90, 30),
        (30, 10, 10),
    ],
)
def test_a_look_goes_back_to_the_last_one_and_48_hours_at_least(
    last: float | None, first: float, since: float
) -> None:
    looked = NOW - timedelta(days=last) if last is not None else None
    begun = begin(NOW, looked, NOW - timedelta(days=first))
    assert timedelta(0) <= NOW - timedelta(days=since) - begun <= timedelta(hours=1)
