"""Choose who is told: save an address as a notification block on the Prefect server.

    make notify URL=https://hooks.slack.com/services/T…/B…/…       Slack
    make notify URL='https://….logic.azure.com/workflows/…'         Microsoft Teams, by a workflow
    make notify URL=https://discord.com/api/webhooks/ID/TOKEN       Discord
    make notify URL='mailto://USER:PASSWORD@example.org?to=…'       e-mail
    make notify URL=https://example.org/hook                        any webhook: JSON is posted
    make notify URL=…                                               any other address of Apprise
    make notify                                                     list who is told

A command line is for every user of the machine to read. An address that must not stand there goes
by the environment, or by a line of standard input:

    read -rs NOTIFY_URL && export NOTIFY_URL && make notify; unset NOTIFY_URL
    make notify URL=- <file                                         also asks for it in a terminal

A test message is sent at once; only if it arrives is the address saved. Each address becomes a
block `retraining-KIND-…`; a block that a person makes in the UI is used likewise if its name is
`retraining` or begins with `retraining-`. (A block "Custom Webhook" of the UI gets every message
but the one that no worker runs: that is the server's to send, and its log would quote the address.)

A webhook gets `subject`, `body`, `type` (info, success, warning, failure), and as fields of
their own what programs want: `kind`, `verdict`, `dataset`, `model`, `model_version`, `run`, and
links as `link_prefect_run` and so on.
"""

import argparse
import getpass
import hashlib
import os
import re
import sys
from datetime import UTC, datetime
from urllib.parse import SplitResult, parse_qsl, urlsplit
from uuid import uuid4

import httpx
from prefect.blocks.abstract import NotificationBlock
from prefect.blocks.notifications import DiscordWebhook, MicrosoftTeamsWebhook, SlackWebhook
from prefect.client.orchestration import SyncPrefectClient
from pydantic import SecretStr

from deployments.stack import StackError
from deployments.watch import connect_to_prefect, errors_as_sentences
from tasks.watch.alarms import keep_rules
from tasks.watch.messages import Message
from tasks.watch.notifications import (
    NAME,
    Recipient,
    apprise_query,
    describe_kinds,
    find_recipients,
    known_to_server,
    silence_libraries,
)
from tasks.watch.notifications import send as send_to

_EXPECTED = {
    "hooks.slack.com": "https://hooks.slack.com/services/T…/B…/…",
    "hooks.slack-gov.com": "https://hooks.slack-gov.com/services/T…/B…/…",
    "discord.com": "https://discord.com/api/webhooks/ID/TOKEN",
    "discordapp.com": "https://discordapp.com/api/webhooks/ID/TOKEN",
}
"""Address formats of hosts that accept no other."""

_PATIENCE = 12
"""Seconds that Apprise waits for a webhook's response; its own default is 4."""


class BadAddress(StackError):
    """The address cannot receive messages; the message does not quote it, as it may be a secret."""


def main() -> int:
    """Save the address that was given, or list the recipients; return 0 only if that was done."""
    argparse.ArgumentParser(
        prog="NOTIFY_URL=… python -m deployments.notify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    return errors_as_sentences(_notify)


def _notify() -> int:
    address = read_address()
    try:
        with connect_to_prefect() as prefect:
            print(add(prefect, address) if address else describe(prefect))
    except httpx.HTTPError as error:
        # Without its text, as the server's answer may quote what it was sent.
        cause = type(error).__name__
        if isinstance(error, httpx.HTTPStatusError):
            cause = str(error.response.status_code)
        raise StackError(
            f"the Prefect server did not do it ({cause}); `make notify` lists what is saved: try "
            "again, or look into the server's log"
        ) from None
    return 0


def read_address() -> str:
    """Return the address of the variables URL, else NOTIFY_URL; empty if neither is set.

    For `-` a line is read from standard input, unseen where that is a terminal. Raises BadAddress
    if there is none.
    """
    address = os.environ.get("URL", "").strip() or os.environ.get("NOTIFY_URL", "").strip()
    if address != "-":
        return address
    try:
        line = getpass.getpass("Address: ") if sys.stdin.isatty() else sys.stdin.readline()
    except EOFError:
        line = ""
    if not line.strip():
        raise BadAddress(
            "standard input holds no address; expected one in its first line, as in "
            "`make notify URL=- <file`"
        )
    return line.strip()


def add(prefect: SyncPrefectClient, address: str) -> str:
    """Send a test message to an address and save the address if it arrives.

    Returns a sentence for the user. Raises BadAddress with a sentence if the address is malformed,
    refuses the message, or does not respond in time.
    """
    kind, block = block_for(address)
    # A hash in the name: a second address of a kind gets a block of its own, and an address that is
    # added again overwrites its block.
    name = f"{NAME}-{kind}-{hashlib.sha256(address.encode()).hexdigest()[:6]}"
    test = Message(
        key="test",
        subject="Test of mnist-retraining",
        body="Somebody ran `make notify`: what happens to the models is told here from now on.",
        severity="info",
        facts={"kind": "test"},
    )
    recipient = Recipient(name, uuid4(), kind, datetime.now(UTC), lambda: block)
    if reason := send_to([recipient], test)[name]:
        raise BadAddress(
            f"The test message did not arrive at {mask(address)}: {reason}. Nothing was saved: "
            "correct the address, or find out why it refuses, and try again."
        )
    block.save(name, overwrite=True)
    changed = keep_rules(prefect, known_to_server(find_recipients(prefect)))
    rules = f" Rules of the server that tell it too: {', '.join(changed)}." if changed else ""
    return f"The test message arrived. {name} is told from now on.{rules}"


def describe(prefect: SyncPrefectClient) -> str:
    """Return a line for each block that receives messages, without its address."""
    recipients = find_recipients(prefect)
    # The server's own rules are updated here too, for blocks that were made in the UI.
    keep_rules(prefect, known_to_server(recipients))
    kinds = describe_kinds(recipients)
    if not kinds:
        return "Nobody is told of anything. `make notify URL=…` sends messages to an address."
    width = max(map(len, kinds))
    return "\n".join(f"{name:{width}}  {kind}" for name, kind in kinds.items())


def block_for(address: str) -> tuple[str, NotificationBlock]:
    """Return the kind of an address, in one word, and the block that sends to it.

    Prefect has blocks for a few services. For every other address the Slack block is used: it
    passes the address to Apprise unchanged, and its type is registered on each server. A webhook
    uses Apprise as well: it is the only way that keeps the address out of the server's log after a
    failure.

    Raises BadAddress.
    """
    silence_libraries()  # Apprise logs an address that it cannot parse, token included
    parts = _split(address)
    host = parts.hostname or ""
    if parts.scheme in {"http", "https"}:
        # Prefect's block knows these addresses, Apprise does not.
        government = r"https?://hooks\.slack-gov\.com/services(/[a-z0-9]+){3}/?"
        if re.fullmatch(government, address, re.IGNORECASE):
            return "slack", SlackWebhook(url=SecretStr(address))
        service = _service(address)
        if service is None and host in _EXPECTED:
            raise BadAddress(
                f"{mask(address)} is not an address of a webhook there; expected {_EXPECTED[host]}"
            )
        if service is None:
            return "webhook", SlackWebhook(url=SecretStr(_json_address(parts)))
        return _native(service, address, parts)
    if parts.scheme in {"mailto", "mailtos"}:
        # Apprise sends HTML by default, in which the lines of a text run together.
        plain = (
            "" if "format=" in parts.query else "&format=text" if parts.query else "?format=text"
        )
        address = f"{address}{plain}"
    if _service(address) is None:
        raise BadAddress(
            f"{mask(address)} is not an address that Apprise knows; expected https://…, "
            "mailto://USER:PASSWORD@HOST?to=… or another one of appriseit.com/services"
        )
    kind = "email" if parts.scheme in {"mailto", "mailtos"} else parts.scheme
    return kind, SlackWebhook(url=SecretStr(address))


def mask(address: str) -> str:
    """Return the public part of an address: the scheme, and the host where it holds no secret."""
    # Tokens are in user, path and query; for other schemes than these also in the host's place.
    scheme, _, rest = address.partition("://")
    if not rest or not re.fullmatch(r"[a-z]{2,12}", scheme.lower()):
        return "this"
    host = re.match(r"(?:[^/?#]*@)?([\w.-]+)", rest)
    shown = host[1] if host and scheme.lower() in {"http", "https", "mailto", "mailtos"} else ""
    return f"{scheme}://{shown}/…" if shown else f"{scheme}://…"


def _native(service: str, address: str, parts: SplitResult) -> tuple[str, NotificationBlock]:
    """Return kind and block of a web address that belongs to `service`, by Apprise's name."""
    secret = SecretStr(address)
    if service == "Discord":
        # The path is /api/webhooks/ID/TOKEN.
        identifier, token = parts.path.strip("/").split("/")[2:4]
        # `wait` asks for an answer, which nobody reads; Apprise has its own name for a thread.
        query = [
            ("thread" if name == "thread_id" else name, value)
            for name, value in parse_qsl(parts.query)
            if name != "wait"
        ]
        if query:  # which the block cannot hold
            apprise = f"discord://{identifier}/{token}/?{apprise_query(query)}"
            return "discord", SlackWebhook(url=SecretStr(apprise))
        discord = DiscordWebhook(webhook_id=SecretStr(identifier), webhook_token=SecretStr(token))
        return "discord", discord
    if service.startswith("Power Automate"):
        return "teams", MicrosoftTeamsWebhook(url=secret)
    return re.sub(r"[^a-z0-9]", "", service.lower()), SlackWebhook(url=secret)


def _split(address: str) -> SplitResult:
    """Return the parts of an address; raise BadAddress if it has no valid form."""
    try:
        parts = urlsplit(address)
        # Only here is the port read: elsewhere a token may stand in its place, and reading a port
        # that is no number raises ValueError.
        web = parts.scheme in {"http", "https"}
        usable = parts.scheme and parts.netloc and not (web and parts.port == 0)
    except ValueError:  # such as a port that is no number, or half an IPv6 address
        usable = False
    if not usable or re.search(r"\s", address) or not address.isprintable():
        raise BadAddress(
            f"{mask(address)} is not an address; expected https://…, mailto://… or another one of "
            "appriseit.com/services, in quotes if it holds & or $"
        )
    return parts


def _service(address: str) -> str | None:
    """Return Apprise's name of the service of an address; None if Apprise rejects the address."""
    from apprise import Apprise

    found = Apprise.instantiate(address)
    if found is None:
        return None
    return str(found.service_name)


def _json_address(parts: SplitResult) -> str:
    """Return Apprise's address of a JSON webhook, with our field names and the same query.

    The prefix `-` marks a parameter of the webhook's own query, `:` renames a field of the body,
    and `rto` is the read timeout in seconds.
    """
    query = [(f"-{name}", value) for name, value in parse_qsl(parts.query, keep_blank_values=True)]
    query += [(":title", "subject"), (":message", "body"), ("rto", str(_PATIENCE))]
    scheme = "jsons" if parts.scheme == "https" else "json"
    path = parts.path or "/"
    return f"{scheme}://{parts.netloc}{path}?{apprise_query(query)}"


if __name__ == "__main__":
    sys.exit(main())
