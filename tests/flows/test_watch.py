"""People are told once of what they have to know, wherever they are, on the real servers."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest
from prefect import flow
from prefect.blocks.core import Block
from prefect.blocks.fields import SecretDict
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.deployments import run_deployment
from prefect.events import Event, RelatedResource, Resource
from prefect.events.schemas.automations import AutomationCore
from prefect.states import Cancelled

from deployments.notify import add
from deployments.stack import Stack
from flows.watch import watch
from tasks.runs.turn import TAG
from tasks.services.s3 import DEFAULT_STORE, Store
from tasks.watch import notifications
from tasks.watch.alarms import keep_rules
from tasks.watch.delivery import Delivery
from tasks.watch.histories import Check, Checks
from tasks.watch.messages import Message, Situation
from tasks.watch.notifications import (
    LastLook,
    Outbox,
    Recipient,
    find_recipients,
    known_to_server,
)
from tests.inbox import TOKEN, Inbox, open_inbox


@pytest.fixture
def prefect(stack: Stack) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as prefect:
        yield prefect


@pytest.fixture
def inbox(prefect: SyncPrefectClient) -> Iterator[Inbox]:
    """Return an inbox; blocks and rules that lead there are removed afterwards."""
    with open_inbox() as inbox:
        yield inbox
        for document in prefect.read_block_documents(include_secrets=False):
            if (document.name or "").startswith("retraining"):
                prefect.delete_block_document(document.id)
        for rule in prefect.read_automations():
            if rule.name in {"no-worker", "watch-stays-failed"}:
                prefect.delete_automation(rule.id)


def save(inbox: Inbox, answer: str, name: str) -> None:
    """Make a block as a person would in the UI, for an address that takes no test message."""
    block = CustomWebhookNotificationBlock(
        name=name,
        url="{{address}}",
        json_data={"subject": "{{subject}}", "body": "{{body}}"},
        secrets={"address": inbox.address(answer)},
    )
    block.save(name)


def in_outbox(store: Store, work: Callable[[Outbox], object], *, minutes: float = 0) -> None:
    """Do something with an outbox, in a flow run as a task does, so many minutes from now."""

    @flow(name="outbox")
    def within() -> None:
        with get_client(sync_client=True) as prefect:
            now = datetime.now(UTC) + timedelta(minutes=minutes)
            work(Outbox(find_recipients(prefect), store, now))

    within()


def retry(outbox: Outbox) -> None:
    outbox.retry(datetime.now(UTC))


def message(key: str, body: str = "why\nlink: x") -> Message:
    facts = {"kind": "failed", "link_form": "https://x.example/run?parameters=%7B%22a%22%3A1%7D"}
    return Message(key=key, subject=f"Failed: {key}", body=body, severity="failure", facts=facts)


def record(store: Store, key: str) -> Delivery:
    return Delivery.model_validate_json(store.get(f"messages/{key}.json"))


def begin(deployment: str, **parameters: object) -> FlowRun:
    run = run_deployment(deployment, parameters=parameters, timeout=0)
    assert isinstance(run, FlowRun)
    return run


def ended(prefect: SyncPrefectClient, run: FlowRun, seconds: float = 180) -> FlowRun:
    deadline = time.monotonic() + seconds
    while not (run.state and run.state.is_final()):
        assert time.monotonic() < deadline, f"{run.name} is still {run.state and run.state.name}"
        time.sleep(0.5)
        run = prefect.read_flow_run(run.id)
    return run


def test_a_run_that_failed_is_told_once_and_the_address_stands_nowhere(
    stack: Stack, prefect: SyncPrefectClient, inbox: Inbox
) -> None:
    add(prefect, inbox.address("take"))
    save(inbox, "refuse", "retraining-refusing")
    store = f"s3://no-such-bucket-{uuid4().hex[:6]}"
    failed = ended(prefect, begin("ingest/on-arrival", dataset="digits", store=store))
    assert failed.state
    assert failed.state.is_failed()
    told = inbox.find("Failed: ingest of digits", seconds=180)  # by the event alone
    assert "does not exist; create it" in told["body"]
    assert f"/runs/flow-run/{failed.id}" in told["body"]
    assert (told["type"], told["kind"], told["run"]) == ("failure", "failed", str(failed.id))
    again = ended(prefect, begin("watch/always"))
    assert again.state
    assert again.state.name in {"Watched", "Overtaken"}
    assert inbox.subjects().count("Failed: ingest of digits") == 1
    kept = record(Store(DEFAULT_STORE), f"{failed.id}-failed-{failed.run_count}")
    assert len(kept.taken) == 1
    assert kept.owed == ["custom-webhook/retraining-refusing"]
    assert_nowhere(stack, prefect)


def assert_nowhere(stack: Stack, prefect: SyncPrefectClient) -> None:
    """Look for the token in every file of the stack, all logs and artifacts of Prefect included."""
    prefect.read_flow_runs()  # what is on its way is written by the time that this is answered
    time.sleep(3)
    files = [path for path in stack.root.rglob("*") if path.is_file()]
    assert any(path.suffix == ".db" for path in files)
    assert any("messages" in path.parts for path in files)
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []


def test_each_address_gets_each_message_once_and_one_that_failed_gets_it_later(
    store: Store, inbox: Inbox
) -> None:
    save(inbox, "take", "retraining-team")
    save(inbox, "refuse", "retraining")
    save(inbox, "take", "another-team")  # not ours
    in_outbox(store, lambda outbox: outbox.send([message("a"), message("b")]))
    assert inbox.subjects() == ["Failed: a", "Failed: b"]
    assert len(inbox.paths) == 4  # one that refuses a message is given the next one
    refusing = Block.load("custom-webhook/retraining")
    assert isinstance(refusing, CustomWebhookNotificationBlock)
    refusing.secrets = SecretDict({"address": inbox.address("take")})
    refusing.save(overwrite=True)

    def look_again(outbox: Outbox) -> None:
        retry(outbox)
        outbox.send([message("a"), message("b"), message("c")])

    in_outbox(store, look_again, minutes=5)
    in_outbox(store, look_again, minutes=10)
    assert sorted(inbox.subjects()) == sorted(2 * ["Failed: a", "Failed: b", "Failed: c"])
    assert record(store, "a").owed == []
    assert TOKEN.encode() not in b"".join(store.get(name) for name in store.names(""))


def test_a_message_that_a_recipient_finds_too_long_holds_no_other_up_and_comes_in_short(
    store: Store, inbox: Inbox
) -> None:
    save(inbox, "short", "retraining-sms")
    both = [message("long", "x" * 1500), message("b")]
    in_outbox(store, lambda outbox: outbox.send(both))
    assert inbox.subjects() == ["Failed: b"]
    for minutes in (5, 15, 35):
        in_outbox(store, retry, minutes=minutes)
    assert inbox.subjects() == ["Failed: b", "Failed: long"]
    assert inbox.received[1]["body"].startswith("https://x.example/run")
    assert record(store, "long").owed == []


def test_a_message_that_nobody_took_is_on_record_and_comes_to_who_is_added_for_that(
    store: Store, inbox: Inbox
) -> None:
    save(inbox, "refuse", "retraining")
    in_outbox(store, lambda outbox: outbox.send([message("a")]))
    assert record(store, "a").owed == ["custom-webhook/retraining"]
    save(inbox, "take", "retraining-team")
    in_outbox(store, retry, minutes=1)  # the refusing one has its pause
    assert inbox.subjects() == ["Failed: a"]
    assert len(inbox.paths) == 2
    in_outbox(store, retry, minutes=5)
    assert inbox.subjects() == ["Failed: a"]
    assert record(store, "a").owed == ["custom-webhook/retraining"]


def test_a_look_begins_where_the_last_one_ended(
    stack: Stack, store: Store, inbox: Inbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = list[datetime]()

    def look(_prefect: object, _store: object, since: datetime, *_: object) -> Situation:
        looks.append(since)
        return Situation(now=datetime.now(UTC))

    def find(prefect: SyncPrefectClient) -> list[Recipient]:
        long_ago = datetime.now(UTC) - timedelta(days=90)
        return [replace(found, created=long_ago) for found in find_recipients(prefect)]

    monkeypatch.setattr(notifications, "look", look)
    monkeypatch.setattr(notifications, "find_recipients", find)
    save(inbox, "take", "retraining")
    friday = datetime.now(UTC) - timedelta(days=3)
    store.put("watch/last-look.json", LastLook(looked=friday).model_dump_json().encode())
    for _ in range(2):
        flow(name="look")(notifications.notify_people.fn)(store.address)
    assert looks[0] < friday
    assert looks[1] > friday  # the first look is on record


def test_an_address_that_hangs_holds_nobody_up_for_longer_than_its_limit(
    store: Store, inbox: Inbox
) -> None:
    save(inbox, "hang", "retraining-hanging")
    save(inbox, "take", "retraining-team")
    begin = time.monotonic()
    in_outbox(store, lambda outbox: outbox.send([message(key) for key in "abcdef"]))
    assert time.monotonic() - begin < 40  # six messages would be a minute
    assert len(inbox.received) == 6
    assert len(inbox.paths) == 7
    assert all(record(store, key).owed == ["custom-webhook/retraining-hanging"] for key in "abcdef")


def test_a_webhook_gets_the_facts_as_fields_exactly(
    prefect: SyncPrefectClient, store: Store, inbox: Inbox
) -> None:
    add(prefect, inbox.address("take"))
    in_outbox(store, lambda outbox: outbox.send([message("a")]))
    received = inbox.received[1]
    assert received["link_form"] == "https://x.example/run?parameters=%7B%22a%22%3A1%7D"
    assert (received["subject"], received["body"]) == ("Failed: a", "why\nlink: x")


def test_without_a_block_nothing_is_sent_and_the_log_says_so(
    stack: Stack, prefect: SyncPrefectClient, store: Store
) -> None:
    run = ended(prefect, begin("watch/always", store=store.address))
    assert run.state
    assert run.state.name == "Watched"
    (said,) = (line for line in lines_of(prefect, run) if "nobody is told" in line)
    assert "make notify" in said
    assert store.names("messages/") == []


def lines_of(prefect: SyncPrefectClient, run: FlowRun) -> list[str]:
    """Return what a run logged, once all of it has arrived."""
    wanted = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run.id]))
    for _ in range(60):
        lines = [log.message for log in prefect.read_logs(wanted)]
        if any("Finished in state Watched" in line for line in lines):
            return lines
        time.sleep(0.5)
    raise AssertionError("the log of the run has no end")


def test_mlflow_being_away_ends_no_watch_and_keeps_it_from_nothing_else(
    stack: Stack,
    prefect: SyncPrefectClient,
    store: Store,
    inbox: Inbox,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save(inbox, "take", "retraining")
    store.put("models/digits-cnn/history/000001-x.json", b"{}")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    state = watch(store.address, return_state=True)
    assert (state.name, state.type) == ("Watched", StateType.COMPLETED)
    assert "the history of digits-cnn was not verified" in str(state.message)
    began = Checks.model_validate_json(store.get("watch/histories-verified.json"))
    day = timedelta(days=1, hours=1)
    earlier = Check(tried=datetime.now(UTC) - day, unread_since=datetime.now(UTC) - day)
    store.put(
        "watch/histories-verified.json",
        began.model_copy(update={"models": {"digits-cnn": earlier}}).model_dump_json().encode(),
    )
    watch(store.address)
    subject = "History not verified for 1 day: digits-cnn"
    assert subject in inbox.subjects()
    assert "127.0.0.1:9" in inbox.find(subject, seconds=1)["body"]


@pytest.fixture
def resting(prefect: SyncPrefectClient) -> Iterator[None]:
    """Keep watch/always from being run by its schedule: its runs would show that a worker works."""
    found = {"id": prefect.read_deployment_by_name("watch/always").id}
    prefect.request("PATCH", "/deployments/{id}", path_params=found, json={"paused": True})
    yield
    prefect.request("PATCH", "/deployments/{id}", path_params=found, json={"paused": False})


def make_hasty_rules(prefect: SyncPrefectClient) -> None:
    """Make the rules anew with the shortest time that Prefect allows."""
    for rule in prefect.read_automations():
        if rule.name in {"no-worker", "watch-stays-failed"}:
            prefect.delete_automation(rule.id)
    hasty = timedelta(seconds=10)
    keep_rules(prefect, known_to_server(find_recipients(prefect)), hasty, hasty)


def test_no_worker_is_told_by_the_server_once_also_of_a_deployment_that_is_made_later(
    prefect: SyncPrefectClient, inbox: Inbox, resting: None
) -> None:
    add(prefect, inbox.address("take"))
    make_hasty_rules(prefect)
    pool = f"nobody-{uuid4().hex[:6]}"
    prefect.create_work_pool(WorkPoolCreate(name=pool, type="process"))
    flows = prefect.read_flows(flow_filter=FlowFilter(name=FlowFilterName(any_=["retain"])))
    deployment = prefect.create_deployment(
        flow_id=flows[0].id,
        name=pool,
        work_pool_name=pool,
        tags=[TAG],
        entrypoint="flows.retain.retain",
    )
    try:
        for _ in range(2):
            prefect.create_flow_run_from_deployment(deployment)
        subject = f"No worker in pool {pool}"
        assert inbox.wait_for(2, seconds=120)[1:] == [subject]
        prefect.create_flow_run_from_deployment(deployment)
        time.sleep(45)  # in which the third is late as well, for longer than the rule waits
        assert inbox.subjects()[1:] == [subject]
        assert f"the work pool {pool}" in inbox.received[1]["body"]
        assert "/runs/flow-run/" in inbox.received[1]["body"]
    finally:
        prefect.delete_deployment(deployment)
        prefect.delete_work_pool(pool)


def test_the_server_tells_once_that_watch_fails_unless_a_run_of_it_ends_well_in_time(
    prefect: SyncPrefectClient, inbox: Inbox, resting: None
) -> None:
    add(prefect, inbox.address("take"))
    make_hasty_rules(prefect)
    run = prefect.create_flow_run(watch, state=Cancelled())
    emit_state(prefect, run, "Crashed")
    time.sleep(3)
    emit_state(prefect, run, "Watched")  # it was resumed
    time.sleep(20)
    assert inbox.subjects()[1:] == []
    emit_state(prefect, run, "Crashed")
    assert inbox.wait_for(2, seconds=60)[1:] == ["watch/always fails"]
    assert f"/runs/flow-run/{run.id}" in inbox.received[1]["body"]
    emit_state(prefect, run, "Timed out")
    time.sleep(20)
    assert len(inbox.received) == 2


def emit_state(prefect: SyncPrefectClient, run: FlowRun, name: str) -> None:
    """Emit the event of a state of a run of ours, as the server does."""
    flow_resource = {
        "prefect.resource.id": f"prefect.flow.{run.flow_id}",
        "prefect.resource.name": "watch",
        "prefect.resource.role": "flow",
    }
    tag = {"prefect.resource.id": f"prefect.tag.{TAG}", "prefect.resource.role": "tag"}
    event = Event(
        event=f"prefect.flow-run.{name}",
        resource=Resource({"prefect.resource.id": f"prefect.flow-run.{run.id}"}),
        related=[RelatedResource(flow_resource), RelatedResource(tag)],
    )
    prefect.request("POST", "/events", json=[json.loads(event.model_dump_json())])


def test_rules_of_an_earlier_version_are_replaced(prefect: SyncPrefectClient, inbox: Inbox) -> None:
    add(prefect, inbox.address("take"))
    (present,) = prefect.read_automations_by_name("no-worker")
    old = AutomationCore.model_validate(present.model_dump())
    old.name = "no-worker-default"
    old.description = f"Says once that no worker of pool default takes the runs of {TAG}."
    prefect.create_automation(old)
    make_hasty_rules(prefect)
    assert prefect.read_automations_by_name("no-worker-default") == []
