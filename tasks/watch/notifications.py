"""Send messages through the notification blocks that are saved on the Prefect server.

Every block that can notify and is called `retraining` or `retraining-…` is used: those of
`make notify`, and those that a person makes in the UI under Blocks (Slack Webhook, Microsoft Teams
Webhook, Discord Webhook, Mattermost, PagerDuty, Opsgenie, Twilio, Sendgrid …).

Each message is stored with the blocks that took it and those that still have to. The address of a
block is as secret as a password. None is ever logged, recorded or put into an error: the reason for
a failure is in our own words, never in those of a library, which may quote addresses.
"""

import asyncio
import logging
import re
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import quote, urlencode
from uuid import UUID

import httpx
from prefect import get_run_logger
from prefect.blocks.abstract import NotificationBlock, NotificationError
from prefect.blocks.core import Block
from prefect.blocks.notifications import AbstractAppriseNotificationBlock
from prefect.client.orchestration import get_client
from prefect.exceptions import PrefectHTTPStatusError
from pydantic import SecretStr, ValidationError

from mnist_cnn.record import Record
from tasks import keys
from tasks.services.clock import server_time
from tasks.services.s3 import Store
from tasks.services.step import step
from tasks.watch.alarms import keep_rules
from tasks.watch.delivery import KEPT, Delivery, Failure, settle
from tasks.watch.messages import Message, compose, shorten
from tasks.watch.situation import look

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import BlockDocument

NAME = "retraining"
"""Beginning of the names of the blocks."""

TIME_LIMIT = 20.0
"""Seconds that a block has for one message. More than Apprise waits for a connection, 4, and for an
answer, 12 at most (deployments/notify.py): otherwise a message that a slow block takes would count
as not taken."""

_LOOK_BACK = timedelta(hours=48)
"""Time that each pass looks back at least; the first pass looks back no further."""
_OVERLAP = timedelta(hours=1)
"""A fault may be reported a quarter of an hour after it was first seen."""
_PAGE = 200
_QUOTED_BY_SERVER = "Custom Webhook"
"""Type of Prefect's own webhook, which raises an error with the address, and the server logs it."""
_QUOTING = ("apprise", "httpx", "httpcore", "urllib3")
"""Loggers of libraries that may quote addresses."""

_BUSY = (408, 425, 429, 502, 503, 504)
"""HTTP statuses that do not mean that the message was refused."""
_DEBUG = ContextVar[list[str] | None]("debug", default=None)
"""Log lines of Apprise below WARNING while a message is sent: only they distinguish the errors of a
connection. They quote addresses, so no handler ever gets them."""


@dataclass(frozen=True)
class Recipient:
    """A saved block that messages are sent to."""

    name: str
    """`TYPE/NAME`, as Prefect loads it: blocks of two types may have one name."""
    id: UUID
    kind: str
    """Prefect's name of its type."""
    created: datetime
    load: Callable[[], NotificationBlock]


class LastLook(Record):
    """The time of the last pass, which reported all events until then."""

    looked: datetime


def find_recipients(prefect: "SyncPrefectClient") -> list[Recipient]:
    """Return the blocks to send messages to, in order of their names."""
    found: list[BlockDocument] = []
    while page := prefect.read_block_documents(
        offset=len(found), limit=_PAGE, include_secrets=False
    ):
        found += page
    return [
        _recipient(document)
        for document in found
        if document.name
        and re.fullmatch(rf"{NAME}(-.*)?", document.name)
        and document.block_schema
        and "notify" in document.block_schema.capabilities
    ]


def _recipient(document: "BlockDocument") -> Recipient:
    assert document.name
    assert document.block_type
    name = f"{document.block_type.slug}/{document.name}"

    def load() -> NotificationBlock:
        block = Block.load(name)
        assert isinstance(block, NotificationBlock), f"{name} cannot notify"
        return block

    created = document.created or datetime.now(UTC)
    return Recipient(name, document.id, document.block_type.name, created, load)


def send(
    recipients: Iterable[Recipient], message: Message, limit: float = TIME_LIMIT
) -> dict[str, Failure | None]:
    """Send a message to all recipients at once; return the failure of each, None for a success.

    Each has a thread of its own, which is abandoned if it does not end in time: no recipient can
    block the caller for longer than `limit` seconds.
    """
    silence_libraries()
    # Apprise reports the kind of a failure only in its log, so that is read, see `_keep_debug`.
    logging.getLogger("apprise").setLevel(logging.DEBUG)
    logging.getLogger("apprise").addFilter(_keep_debug)
    results: dict[str, Failure | None] = {}
    threads: dict[str, threading.Thread] = {}
    for recipient in recipients:
        # A copy of the context for each thread: `_DEBUG` then has a list for each message.
        work = partial(copy_context().run, _attempt, recipient, message, results)
        threads[recipient.name] = threading.Thread(target=work, daemon=True)
        threads[recipient.name].start()
    end = time.monotonic() + limit
    for thread in threads.values():
        thread.join(max(0.0, end - time.monotonic()))
    late = Failure("late", f"it did not answer within {limit:.0f} s")
    return {name: results.get(name, late) for name in threads}


def silence_libraries() -> None:
    """Keep records of the libraries that quote addresses from every handler of the process.

    To be called before an address becomes a block: Apprise logs one that it cannot parse.
    """
    for name in _QUOTING:
        logger = logging.getLogger(name)
        logger.propagate = False
        # Without any handler Python would write warnings to stderr.
        if not any(isinstance(handler, logging.NullHandler) for handler in logger.handlers):
            logger.addHandler(logging.NullHandler())


def _keep_debug(record: logging.LogRecord) -> bool:
    """Filter out records below WARNING, and keep them for the thread that sends in this context."""
    if record.levelno >= logging.WARNING:
        return True
    if (debug := _DEBUG.get()) is not None:
        debug.append(record.getMessage())
    return False


def _attempt(recipient: Recipient, message: Message, results: dict[str, Failure | None]) -> None:
    debug = list[str]()
    _DEBUG.set(debug)
    try:
        block = _with_facts(recipient.load(), message)
        with block.raise_on_failure():
            sent: object = block.notify(subject=message.subject, body=message.body)
            if isinstance(sent, Coroutine):  # a block whose `notify` is only asynchronous
                asyncio.run(sent)
    except Exception as error:  # noqa: BLE001 - a block of any kind raises anything
        results[recipient.name] = classify(error, "\n".join(debug))
    else:
        results[recipient.name] = None


def _with_facts(block: NotificationBlock, message: Message) -> NotificationBlock:
    """Add the facts to the query of a JSON webhook: Apprise sends them as fields of their own."""
    url = getattr(block, "url", None)
    address = url.get_secret_value() if isinstance(url, SecretStr) else ""
    if address.startswith(("json://", "jsons://")):
        extra = apprise_query((f":{name}", value) for name, value in message.facts.items())
        joint = "&" if "?" in address else "?"
        block = type(block)(url=SecretStr(f"{address}{joint}{extra}"))
    if isinstance(block, AbstractAppriseNotificationBlock):
        block.notify_type = message.severity
    return block


def apprise_query(pairs: Iterable[tuple[str, str]]) -> str:
    """Return a query for Apprise's JSON plugin, which decodes each value twice."""
    return urlencode(
        [(name, value.replace("%", "%25")) for name, value in pairs], safe=":", quote_via=quote
    )


def classify(error: Exception, debug: str = "") -> Failure:
    """Return the failure behind an error, in our own words; `debug` is Apprise's debug log."""
    if isinstance(error, httpx.HTTPStatusError):
        return _answered(error.response.status_code)
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return Failure("unreachable", "it could not be reached")
    if isinstance(error, httpx.TransportError):
        return Failure("late", "it did not answer")
    if isinstance(error, NotificationError):
        return _classify_log(str(error.log), debug)
    return Failure("refused", f"it failed with {type(error).__name__}")


def _classify_log(log: str, debug: str) -> Failure:
    # Apprise also logs the answer of a mail server as a connection error: (552, b'too long').
    if status := re.search(r"error=(\d{3})\b", log) or re.search(r"\((5\d\d), b['\"]", debug):
        return _answered(int(status[1]))
    if re.search("Read timed out|Connection aborted|Connection unexpectedly closed", debug):
        return Failure("late", "it did not answer")
    if "onnection error" in log:
        return Failure("unreachable", "it could not be reached")
    return Failure("refused", "it refused the message")


def _answered(status: int) -> Failure:
    return Failure("unreachable" if status in _BUSY else "refused", f"it answered {status}")


class Outbox:
    """Messages to recipients: each is sent once to each of them, and again to those that failed.

    Every message is recorded, taken or not. A recipient that is late or cannot be reached gets no
    other message in this pass, so that a hanging one costs one time limit a pass, however many
    messages there are. One that refuses a message gets the others.
    """

    def __init__(self, recipients: Sequence[Recipient], store: Store, now: datetime) -> None:
        self._recipients = {recipient.name: recipient for recipient in recipients}
        self._blocked = set[str]()
        self._store = store
        self._now = now
        self._entries = {entry.name: entry for entry in store.entries(keys.MESSAGES)}
        self._logger = get_run_logger()

    @property
    def keys(self) -> set[str]:
        """The keys of all messages that were sent."""
        return {name.removeprefix(keys.MESSAGES).removesuffix(".json") for name in self._entries}

    def retry(self, since: datetime) -> None:
        """Send the messages that are owed from earlier passes; `since` is the time of the last one.

        A message that no block took goes to all of them, also to one that was added since.
        """
        for entry in self._entries.values():
            # No delivery is retried for longer than that, so older messages are not read.
            if entry.modified > since - KEPT:
                try:
                    delivery = Delivery.model_validate_json(self._store.get(entry.name))
                except ValidationError as error:  # it must not hold up the messages after it
                    self._logger.warning("%s is no message of ours: %s", entry.name, error)
                    continue
                if not delivery.taken:
                    # A dict keeps the order and drops duplicates.
                    everybody = dict.fromkeys([*delivery.owed, *self._recipients])
                    owed = [name for name in everybody if name not in delivery.given_up]
                    delivery = delivery.model_copy(update={"owed": owed})
                self._deliver(delivery)

    def send(self, messages: Iterable[Message]) -> list[Message]:
        """Send the messages that were not sent before; return those that a recipient took."""
        known = self.keys
        everybody = list(self._recipients)
        return [
            message
            for message in messages
            if message.key not in known
            and self._deliver(
                Delivery(message=message, sent=self._now, taken=[], owed=everybody), new=True
            )
        ]

    def _deliver(self, before: Delivery, *, new: bool = False) -> bool:
        """Send to the blocks that are due and record the results; return True if one took it."""
        names = [
            name
            for name in before.due(self._now)
            if name in self._recipients and name not in self._blocked
        ]
        # A new message is recorded even if no block can be tried in this pass.
        if not names and not new:
            return False
        results = self._send(before, names)
        after = settle(before, results, self._now)
        self._note(after, results)
        name = keys.message(before.message.key)
        self._store.put(name, after.model_dump_json(indent=1).encode())
        return len(after.taken) > len(before.taken)

    def _send(self, delivery: Delivery, names: Iterable[str]) -> dict[str, Failure | None]:
        short = {name for name, tries in delivery.tries.items() if tries.short}
        full = [self._recipients[name] for name in names if name not in short]
        cut = [self._recipients[name] for name in names if name in short]
        return send(full, delivery.message) | send(cut, shorten(delivery.message))

    def _note(self, delivery: Delivery, results: Mapping[str, Failure | None]) -> None:
        subject = delivery.message.subject
        for name, failure in results.items():
            if failure:
                self._blocked |= {name} if failure.blocks else set()
                then = "given up" if name in delivery.given_up else "tried again"
                self._logger.warning(
                    "block %s did not take %r: %s; it is %s", name, subject, failure, then
                )
        if taken := [name for name, failure in results.items() if failure is None]:
            self._logger.info("%s was sent to %s", subject, ", ".join(taken))


@step
def notify_people(store: str) -> list[str]:
    """Send new messages about events and faults to every recipient; return the subjects sent.

    The failure of a recipient is logged, and the message retried in a later pass; the task goes on.
    """
    s3 = Store(store)
    with get_client(sync_client=True) as prefect:
        now = server_time(prefect)
        recipients = find_recipients(prefect)
        if not recipients:
            get_run_logger().info(
                "nobody is told of anything: no notification block is called %s; `make notify` "
                "makes one",
                NAME,
            )
            return []
        try:
            keep_rules(prefect, known_to_server(recipients))
        except (PrefectHTTPStatusError, httpx.HTTPError) as error:  # the messages go out even so
            get_run_logger().warning("the server's own alarms were not renewed: %s", error)
        last = read_last_look(s3)
        outbox = Outbox(recipients, s3, now)
        first = min(recipient.created for recipient in recipients)
        situation = look(prefect, s3, begin(now, last, first), outbox.keys, now)
    outbox.retry(min(now, last or now))
    sent = outbox.send(compose(situation))
    # Last: a task that dies before it looks back to the same time again.
    s3.put(keys.LAST_LOOK, LastLook(looked=now).model_dump_json().encode())
    return [message.subject for message in sent]


def read_last_look(store: Store) -> datetime | None:
    """Return the time of the last pass; None if there was none, or it cannot be read."""
    try:
        return LastLook.model_validate_json(store.get(keys.LAST_LOOK)).looked
    except (FileNotFoundError, ValidationError):
        return None


def begin(now: datetime, last: datetime | None, first: datetime) -> datetime:
    """Return the time from which on runs are reported: the last pass, but 48 hours ago at least.

    Never before the `first` block was made: the first pass over a system with a long past must not
    send a flood of messages.
    """
    since = now - _LOOK_BACK
    return max(min(since, last - _OVERLAP) if last else since, first)


def known_to_server(recipients: Iterable[Recipient]) -> list[UUID]:
    """Return the ids of the blocks that the server may use: those whose address it does not log."""
    return [each.id for each in recipients if each.kind != _QUOTED_BY_SERVER]


def describe_kinds(recipients: Iterable[Recipient]) -> Mapping[str, str]:
    """Return the kind of each recipient by its name, without its address."""
    silence_libraries()
    return {recipient.name: _kind(recipient) for recipient in recipients}


def _kind(recipient: Recipient) -> str:
    from apprise import Apprise

    try:
        url = getattr(recipient.load(), "url", None)
    except httpx.HTTPError:  # of the Prefect server
        raise
    except Exception as error:  # noqa: BLE001 - of any kind, and its text may quote the address
        return f"{recipient.kind}, which cannot be loaded ({type(error).__name__}); save it again"
    if isinstance(url, SecretStr) and (service := Apprise.instantiate(url.get_secret_value())):
        return str(service.service_name)
    return recipient.kind
