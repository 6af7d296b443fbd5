"""An address becomes a block if a test message arrives there; it is shown nowhere."""

import io
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Never
from uuid import uuid4

import httpx
import pytest
from apprise.plugins.discord import NotifyDiscord
from prefect.blocks.abstract import NotificationBlock
from prefect.blocks.notifications import DiscordWebhook, SlackWebhook
from prefect.client.orchestration import get_client
from pydantic import SecretStr

from deployments.notify import BadAddress, block_for, main, mask, read_address
from deployments.stack import PROJECT, Stack
from tasks.watch.notifications import Recipient, describe_kinds
from tests.inbox import TOKEN, Inbox, open_inbox

BIN = Path(sys.executable).parent
SLACK = f"https://hooks.slack.com/services/T1JJ3T3L2/A1BRTD4JD/{'a' * 24}"
TEAMS = (
    "https://prod-12.westeurope.logic.azure.com:443/workflows/0123456789abcdef/triggers/manual/"
    "paths/invoke?api-version=2016-06-01&sp=%2Ftriggers%2Fmanual%2Frun&sv=1.0&sig=SIGNATURE"
)


@pytest.mark.parametrize(
    ("address", "kind", "block"),
    [
        (SLACK, "slack", "SlackWebhook"),
        (SLACK.replace("slack.com", "slack-gov.com"), "slack", "SlackWebhook"),
        (TEAMS, "teams", "MicrosoftTeamsWebhook"),
        ("https://discord.com/api/webhooks/417421/JHMHI8qBe7bk2ZwO", "discord", "DiscordWebhook"),
        ("https://chat.googleapis.com/v1/spaces/A/messages?key=K&token=T", "googlechat", None),
        ("https://mattermost.example/hooks/3ccdd113474722377935511fc8", "mattermost", None),
        ("mailto://ada:word@example.org?to=team@example.org", "email", None),
        ("mailtos://ada:word@example.org", "email", None),
        ("https://example.org/hook/abc", "webhook", None),
        ("http://ada:word@10.0.0.7:8080/", "webhook", None),
        ("tgram://123456789:abcdefg_hijklmnop/12315544/", "tgram", None),
        ("json://example.org/hook", "json", None),
    ],
)
def test_the_address_chooses_the_block(address: str, kind: str, block: str | None) -> None:
    found, made = block_for(address)
    assert (found, type(made).__name__) == (kind, block or "SlackWebhook")
    if isinstance(made, SlackWebhook):
        assert made._apprise_client is not None
        assert len(made._apprise_client) == 1  # Apprise took it


def test_the_parts_of_a_discord_address_reach_its_block() -> None:
    _, block = block_for("https://discord.com/api/webhooks/417421/JHMHI8qBe7bk2ZwO?wait=true")
    assert isinstance(block, DiscordWebhook)
    assert block.webhook_id == SecretStr("417421")
    assert block.webhook_token == SecretStr("JHMHI8qBe7bk2ZwO")


def test_a_thread_of_a_discord_address_is_kept() -> None:
    kind, block = block_for("https://discord.com/api/webhooks/417421/JHMHI8qBe7bk2ZwO?thread_id=77")
    assert kind == "discord"
    assert isinstance(block, SlackWebhook)
    assert block._apprise_client is not None
    (server,) = block._apprise_client
    assert isinstance(server, NotifyDiscord)
    assert (server.webhook_id, server.webhook_token) == ("417421", "JHMHI8qBe7bk2ZwO")
    assert server.thread_id == "77"


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> io.StringIO:
    """Return all that Apprise logs, as in a process that has not silenced it yet."""
    logger = logging.getLogger("apprise")
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logger, "handlers", [])
    return caplog.handler.stream


def test_a_malformed_address_is_not_logged(heard: io.StringIO) -> None:
    for host in ("hooks.slack.com", "hooks.slack-gov.com", "discord.com"):
        with pytest.raises(BadAddress, match=f"expected https://{host}"):
            block_for(f"https://{host}/services/{TOKEN}")
    assert heard.getvalue() == ""


def test_a_malformed_address_that_was_saved_is_not_logged(heard: io.StringIO) -> None:
    def slack() -> NotificationBlock:
        return SlackWebhook(url=SecretStr(f"https://hooks.slack.com/services/{TOKEN}"))

    def discord() -> NotificationBlock:  # Apprise's error quotes the id
        return DiscordWebhook(webhook_id=SecretStr(" "), webhook_token=SecretStr(TOKEN))

    kinds = describe_kinds(
        Recipient(load.__name__, uuid4(), load.__name__, datetime.now(UTC), load)
        for load in (slack, discord)
    )
    assert kinds["slack"] == "slack"
    assert kinds["discord"] == "discord, which cannot be loaded (TypeError); save it again"
    assert heard.getvalue() == ""


def test_an_address_is_taken_from_where_no_other_user_reads_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("URL", raising=False)
    monkeypatch.delenv("NOTIFY_URL", raising=False)
    assert read_address() == ""
    monkeypatch.setenv("NOTIFY_URL", f"{SLACK}\n")
    monkeypatch.setenv("URL", "")  # as make sets it where none is typed
    assert read_address() == SLACK
    monkeypatch.setenv("URL", TEAMS)
    assert read_address() == TEAMS
    monkeypatch.setenv("URL", "-")
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{TEAMS}\nanother line\n"))
    assert read_address() == TEAMS
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    with pytest.raises(BadAddress, match="standard input holds no address; expected one"):
        read_address()


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (httpx.ReadError(TOKEN), 1, r"did not do it \(ReadError\); `make notify` lists"),
        (
            httpx.HTTPStatusError(
                TOKEN, request=httpx.Request("GET", "http://a"), response=httpx.Response(422)
            ),
            1,
            r"did not do it \(422\)",
        ),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_a_server_that_goes_away_and_ctrl_c_have_no_traceback(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    sentence: str,
) -> None:
    def fail(_prefect: object) -> Never:
        raise error

    for name in ("URL", "NOTIFY_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.argv", ["notify"])
    monkeypatch.setattr("deployments.notify.connect_to_prefect", nullcontext)
    monkeypatch.setattr("deployments.notify.describe", fail)
    assert main() == code
    shown = capsys.readouterr()
    assert re.search(sentence, shown.err)
    assert TOKEN not in shown.out + shown.err


@pytest.mark.parametrize(
    "address",
    [
        TOKEN,
        f"https://hooks.slack.com/{TOKEN}",
        f"https://hooks.slack-gov.com/services/{TOKEN}",
        f"https://discord.com/api/{TOKEN}",
        f"https://example.org:port/{TOKEN}",
        f"https://[::1/{TOKEN}",
        f"https://exam ple.org/{TOKEN}",
        f"https://example.org/{TOKEN}\x00",
        f"https:///{TOKEN}",
        f"foo://{TOKEN}/{TOKEN}",
        f"mailto://?{TOKEN}",
        f"ftp://example.org/{TOKEN}",
    ],
)
def test_a_malformed_address_is_a_sentence_that_does_not_quote_it(address: str) -> None:
    with pytest.raises(BadAddress, match="expected") as refusal:
        block_for(address)
    assert TOKEN not in str(refusal.value)


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        (f"https://ada:{TOKEN}@example.org/{TOKEN}", "https://example.org/…"),
        (f"mailtos://ada:{TOKEN}@example.org", "mailtos://example.org/…"),
        (f"tgram://{TOKEN}/{TOKEN}", "tgram://…"),
        (TOKEN, "this"),
        (f"{TOKEN}://example.org", "this"),
    ],
)
def test_an_address_is_shown_without_what_is_secret(address: str, shown: str) -> None:
    assert mask(address) == shown


@pytest.fixture
def inbox() -> Iterator[Inbox]:
    with open_inbox() as inbox:
        yield inbox


@pytest.fixture
def cleared(stack: Stack) -> Iterator[None]:
    """Remove blocks and rules afterwards, or every later run of the session sends messages."""
    yield
    with get_client(sync_client=True) as prefect:
        for document in prefect.read_block_documents(include_secrets=False):
            if (document.name or "").startswith("retraining"):
                prefect.delete_block_document(document.id)
        for rule in prefect.read_automations():
            if rule.name in {"no-worker", "watch-stays-failed"}:
                prefect.delete_automation(rule.id)


def notify(address: str = "") -> subprocess.CompletedProcess[str]:
    given = [f"URL={address}"] if address else []
    return subprocess.run(
        # As a person types it, but with this interpreter, and without renewing its environment.
        ["make", "--silent", "-o.venv/installed", f"BIN={BIN}", "notify", *given],
        cwd=PROJECT,
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_address_that_takes_the_test_message_is_saved_and_listed(
    inbox: Inbox, cleared: None
) -> None:
    done = notify(inbox.address("take"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "arrived" in done.stdout
    assert inbox.subjects() == ["Test of mnist-retraining"]
    assert inbox.received[0]["kind"] == "test"
    assert inbox.paths == [f"/take/{TOKEN}?key={TOKEN}&x=a+b"]  # as the address says
    again = notify(inbox.address("take"))
    assert again.returncode == 0
    listed = notify().stdout
    assert listed.count("\n") == 1  # the same address is the same block
    assert listed.split() == ["slack-webhook/" + done.stdout.split()[4], "JSON"]
    with get_client(sync_client=True) as prefect:
        rules = {rule.name: rule for rule in prefect.read_automations()}
    assert {"no-worker", "watch-stays-failed"} <= rules.keys()
    assert TOKEN not in done.stdout + listed + str(rules)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [("refuse", "it answered 500"), ("hang", "it did not answer")],
)
def test_an_address_that_does_not_take_the_test_message_is_not_saved(
    inbox: Inbox, cleared: None, answer: str, reason: str
) -> None:
    begin = time.monotonic()
    done = notify(inbox.address(answer))
    assert done.returncode != 0
    assert reason in done.stderr
    assert "Traceback" not in done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert "Nobody is told" in notify().stdout
    assert time.monotonic() - begin < 60


def test_an_address_where_nobody_listens_is_a_sentence(inbox: Inbox, cleared: None) -> None:
    inbox.server_close()
    done = notify(inbox.address("take"))
    assert "did not arrive at http://127.0.0.1/…" in done.stderr
    assert "could not be reached" in done.stderr
    assert TOKEN not in done.stdout + done.stderr


@pytest.mark.slow
def test_a_server_that_does_not_answer_is_a_sentence() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deployments.notify"],
        cwd=PROJECT,
        env=os.environ | {"PREFECT_API_URL": "http://127.0.0.1:9/api", "URL": SLACK},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "the Prefect server does not answer" in done.stderr
    assert "aaaa" not in done.stdout + done.stderr
