"""Send messages through the notification blocks that are saved on the Prefect server.

Every block whose name is `retraining` or begins with `retraining-`, and that can notify, is used:
those of `make notify`, and those that a person makes in the UI under Blocks (Slack Webhook,
Microsoft Teams Webhook, Discord Webhook, Mattermost, PagerDuty, Opsgenie, Twilio, Sendgrid …).

    STORE/messages/KEY.json    a message, which blocks took it, and which still have to

An address is as good as a password. None is ever logged, recorded or put into an error: why a block
failed is said in words of ours, never in those of a library, which quote addresses.
"""

import asyncio
import logging
import re
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextvars import copy_context
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
from pydantic import BaseModel, SecretStr

from tasks.registry.aliases import verify_history
from tasks.registry.versions import Refused
from tasks.services.clock import server_time
from tasks.services.s3 import Store
from tasks.services.step import step
from tasks.watch.alarms import keep_rules
from tasks.watch.messages import Message, Situation, compose
from tasks.watch.situation import look

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import BlockDocument

NAME = "retraining"
"""What the names of the blocks begin with."""

TIME_LIMIT = 10.0
"""Seconds that a block has for one message."""

FOLDER = "messages/"
_VERIFIED = "watch/histories-verified.json"

_RETRY = timedelta(hours=48)
"""How long a block that failed is given the message again."""
_PAGE = 200
_QUOTED_BY_SERVER = "Custom Webhook"
"""Prefect's own webhook raises an error that quotes the address, and the server logs it."""
_QUOTING = ("apprise", "httpx", "httpcore", "urllib3")
"""Loggers of libraries that may quote addresses."""


@dataclass(frozen=True)
class Recipient:
    """A saved block: where to send messages."""

    name: str
    """As Prefect addresses it, `TYPE/NAME`: blocks of two types may have one name."""
    id: UUID
    kind: str
    """What Prefect calls its type."""
    created: datetime
    load: Callable[[], NotificationBlock]


class Delivery(BaseModel, frozen=True):
    """A message that at least one block took."""

    format: int = 1
    message: Message
    sent: datetime
    taken: list[str]
    owed: list[str]
    """Blocks that failed and are tried again."""


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
) -> dict[str, str | None]:
    """Send a message to all recipients at once; return for each why it failed, None if it did not.

    Each has a thread of its own that is left behind if it does not end in time: nothing that a
    recipient does can hold the caller up for longer than `limit` seconds.
    """
    for name in _QUOTING:
        logging.getLogger(name).propagate = False
        logging.getLogger(name).addHandler(logging.NullHandler())
    results: dict[str, str | None] = {}
    threads: dict[str, threading.Thread] = {}
    for recipient in recipients:
        work = partial(copy_context().run, _attempt, recipient, message, results)
        threads[recipient.name] = threading.Thread(target=work, daemon=True)
        threads[recipient.name].start()
    end = time.monotonic() + limit
    for thread in threads.values():
        thread.join(max(0.0, end - time.monotonic()))
    late = f"it did not answer within {limit:.0f} s"
    return {name: results.get(name, late) for name in threads}


def _attempt(recipient: Recipient, message: Message, results: dict[str, str | None]) -> None:
    try:
        block = _with_facts(recipient.load(), message)
        with block.raise_on_failure():
            sent: object = block.notify(subject=message.subject, body=message.body)
            if isinstance(sent, Coroutine):  # of a block that only knows how to in a loop
                asyncio.run(sent)
    except Exception as error:  # noqa: BLE001 - a block of any kind raises anything
        results[recipient.name] = _reason(error)
    else:
        results[recipient.name] = None


def _with_facts(block: NotificationBlock, message: Message) -> NotificationBlock:
    """Add the facts to what a JSON webhook gets: Apprise sends them as fields of their own."""
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
    """Return a query that Apprise's JSON plugin reads as it was meant; it decodes values twice."""
    return urlencode(
        [(name, value.replace("%", "%25")) for name, value in pairs], safe=":", quote_via=quote
    )


def _reason(error: Exception) -> str:
    """Say why a block failed without a word of the library's."""
    if isinstance(error, httpx.HTTPStatusError):
        return f"it answered {error.response.status_code}"
    if isinstance(error, httpx.TimeoutException):
        return "it did not answer in time"
    if isinstance(error, httpx.TransportError):
        return "no connection could be made"
    if isinstance(error, NotificationError):
        status = re.search(r"error=(\d{3})\b", str(error.log))
        refused = "it refused, did not answer in time, or could not be reached"
        return f"it answered {status[1]}" if status else refused
    return f"it failed with {type(error).__name__}"


class Outbox:
    """Messages on their way: each is sent once to each recipient, and again to those that failed.

    A recipient that fails gets no other message in this pass, so that a hanging one costs one time
    limit a pass, however many messages there are.
    """

    def __init__(self, recipients: Sequence[Recipient], store: Store) -> None:
        self._recipients = {recipient.name: recipient for recipient in recipients}
        self._failed = set[str]()
        self._store = store
        self._entries = {entry.name: entry for entry in store.entries(FOLDER)}
        self._logger = get_run_logger()

    @property
    def keys(self) -> set[str]:
        """The keys of all messages that were sent."""
        return {name.removeprefix(FOLDER).removesuffix(".json") for name in self._entries}

    def retry(self) -> None:
        """Send what recipients owe from earlier passes."""
        oldest = datetime.now(UTC) - _RETRY
        for entry in self._entries.values():
            if entry.modified < oldest:
                continue
            delivery = Delivery.model_validate_json(self._store.get(entry.name))
            owed = [name for name in delivery.owed if name in self._recipients]
            if owed and delivery.sent > oldest:
                self._deliver(delivery.message, owed, delivery)

    def send(self, messages: Iterable[Message]) -> list[Message]:
        """Send the messages that were not sent before; return those that somebody took."""
        known = self.keys
        return [
            message
            for message in messages
            if message.key not in known and self._deliver(message, list(self._recipients))
        ]

    def _deliver(
        self, message: Message, names: Sequence[str], before: Delivery | None = None
    ) -> bool:
        """Send to those that did not fail in this pass, and record who took it."""
        fit = [self._recipients[name] for name in names if name not in self._failed]
        results = send(fit, message)
        for name, reason in results.items():
            if reason:
                self._failed.add(name)
                self._logger.warning(
                    "block %s did not take %r: %s; it is tried again at the next look",
                    name,
                    message.subject,
                    reason,
                )
        taken = [name for name, reason in results.items() if reason is None]
        if taken:
            self._logger.info("%s was sent to %s", message.subject, ", ".join(taken))
            everybody = [*(before.taken if before else []), *taken]
            record = Delivery(
                message=message,
                sent=before.sent if before else datetime.now(UTC),
                taken=everybody,
                owed=[name for name in names if name not in taken],
            )
            name = f"{FOLDER}{message.key}.json"
            self._store.put(name, record.model_dump_json(indent=1).encode())
        return bool(taken)


@step
def notify_people(store: str) -> list[str]:
    """Send what happened and what is wrong to every recipient; return the subjects sent.

    A recipient that fails is logged and tried again at the next look; it fails nothing.
    """
    with get_client(sync_client=True) as prefect:
        now, recipients = server_time(prefect), find_recipients(prefect)
        if not recipients:
            get_run_logger().info(
                "nobody is told of anything: no notification block is called %s; `make notify` "
                "makes one",
                NAME,
            )
            return []
        keep_rules(prefect, known_to_server(recipients))
        outbox = Outbox(recipients, Store(store))
        situation = look(prefect, Store(store), _since(recipients, now), outbox.keys, now)
    outbox.retry()
    return [message.subject for message in outbox.send(compose(situation))]


@step
def notify_of_histories(store: str) -> list[str]:
    """Once a day, verify the history of every model and send what is broken; return the subjects.

    By itself, because it needs MLflow, which may be away.
    """
    place, now = Store(store), datetime.now(UTC)
    if place.has(_VERIFIED) and now - place.modified(_VERIFIED) < timedelta(days=1):
        return []
    with get_client(sync_client=True) as prefect:
        recipients = find_recipients(prefect)
    if not recipients:
        return []
    situation = Situation(now=now, broken=find_broken_histories(place))
    sent = Outbox(recipients, place).send(compose(situation))
    place.put(_VERIFIED, b"{}")
    return [message.subject for message in sent]


def find_broken_histories(store: Store) -> dict[str, str]:
    """Return what is wrong with the history of each model that has one in the store."""
    broken = dict[str, str]()
    for model in sorted({name.split("/")[1] for name in store.names("models/")}):
        try:
            _, _, problems = verify_history(model, store)
        except Refused as refusal:
            problems = [f"it has a history, but {refusal}"]
        if problems:
            broken[model] = "; ".join(problems)
    return broken


def _since(recipients: Sequence[Recipient], now: datetime) -> datetime:
    """Return from when on runs are told of: 48 hours ago, or when the first block was made.

    So the first look at a system with a long past sends no flood.
    """
    return max(now - _RETRY, min(recipient.created for recipient in recipients))


def known_to_server(recipients: Iterable[Recipient]) -> list[UUID]:
    """Return the blocks that the server itself may use, without those that it would quote."""
    return [each.id for each in recipients if each.kind != _QUOTED_BY_SERVER]


def describe_kinds(recipients: Iterable[Recipient]) -> Mapping[str, str]:
    """Return the kind of each recipient by its name, without its address."""
    return {recipient.name: _kind(recipient) for recipient in recipients}


def _kind(recipient: Recipient) -> str:
    from apprise import Apprise

    url = getattr(recipient.load(), "url", None)
    if isinstance(url, SecretStr) and (service := Apprise.instantiate(url.get_secret_value())):
        return str(service.service_name)
    return recipient.kind
