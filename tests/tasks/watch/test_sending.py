"""Messages on their way through the real libraries to a real HTTP server."""

import logging
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from uuid import uuid4

import pytest

from deployments.notify import block_for
from tasks.watch.delivery import Failure
from tasks.watch.messages import Message
from tasks.watch.notifications import Recipient, send
from tests.inbox import TOKEN, Inbox, open_inbox

MESSAGE = Message(key="a", subject="Failed: a", body="x" * 1500, severity="failure", facts={})


@pytest.fixture
def inbox() -> Iterator[Inbox]:
    with open_inbox() as inbox:
        yield inbox


def attempt(address: str) -> Failure | None:
    kind, block = block_for(address)
    recipient = Recipient("webhook", uuid4(), kind, datetime.now(UTC), lambda: block)
    return send([recipient], MESSAGE)["webhook"]


@pytest.mark.slow
def test_a_webhook_that_takes_the_message_and_answers_late_has_taken_it(inbox: Inbox) -> None:
    """Within Apprise's patience with a webhook, 12 s: it would get the message again and again."""
    begin = time.monotonic()
    assert attempt(inbox.address("slow")) is None
    assert time.monotonic() - begin > 10
    assert inbox.subjects() == ["Failed: a"]


@pytest.mark.slow
def test_a_webhook_that_never_answers_is_late_by_apprises_patience(inbox: Inbox) -> None:
    assert attempt(inbox.address("hang")) == Failure("late", "it did not answer")


def test_a_webhook_that_does_not_take_a_message_of_that_length_has_refused_it(
    inbox: Inbox,
) -> None:
    assert attempt(inbox.address("short")) == Failure("refused", "it answered 413")


def test_where_nobody_listens_nobody_can_be_reached() -> None:
    assert attempt("http://127.0.0.1:9/") == Failure("unreachable", "it could not be reached")


def test_what_apprise_notes_of_an_address_reaches_no_handler(inbox: Inbox) -> None:
    heard = list[logging.LogRecord]()

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record)

    ear = Ear()  # as PREFECT_LOGGING_EXTRA_LOGGERS=apprise sets one
    logging.getLogger("apprise").addHandler(ear)
    try:
        attempt(inbox.address("refuse"))
        attempt(inbox.address("take"))
    finally:
        logging.getLogger("apprise").removeHandler(ear)
    assert heard
    assert not any(TOKEN in record.getMessage() for record in heard)
