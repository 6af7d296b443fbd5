"""People are told once of what they have to know, wherever they are, on the real servers."""

import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from uuid import uuid4

import pytest
from prefect import flow
from prefect.blocks.core import Block
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment

from deployments.notify import add
from deployments.stack import Stack
from tasks.runs.turn import TAG
from tasks.services.s3 import DEFAULT_STORE, Store
from tasks.watch.alarms import keep_rules
from tasks.watch.messages import Message
from tasks.watch.notifications import Delivery, Outbox, find_recipients, known_to_server
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
            if rule.name.startswith(("no-worker-", "watch-fails")):
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


def in_outbox(store: Store, work: Callable[[Outbox], object]) -> None:
    """Do something with an outbox, in a flow run as a task does, and return nothing."""

    @flow(name="outbox")
    def within() -> None:
        with get_client(sync_client=True) as prefect:
            work(Outbox(find_recipients(prefect), store))

    within()


def message(key: str) -> Message:
    facts = {"kind": "failed", "link_form": "https://x.example/run?parameters=%7B%22a%22%3A1%7D"}
    return Message(
        key=key, subject=f"Failed: {key}", body="why\nlink: x", severity="failure", facts=facts
    )


def record(store: Store, key: str) -> Delivery:
    return Delivery.model_validate_json(store.get(f"messages/{key}.json"))


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
    failed = run_deployment(
        "ingest/on-arrival", parameters={"dataset": "digits", "store": store}, timeout=0
    )
    failed = ended(prefect, failed)
    assert failed.state
    assert failed.state.is_failed()
    told = inbox.find("Failed: ingest of digits", seconds=180)  # by the event alone
    assert "does not exist; create it" in told["body"]
    assert f"/runs/flow-run/{failed.id}" in told["body"]
    assert (told["type"], told["kind"], told["run"]) == ("failure", "failed", str(failed.id))
    again = run_deployment("watch/always", timeout=0)
    assert ended(prefect, again).state.name in {"Watched", "Overtaken"}
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
    assert len(inbox.paths) == 3  # a failing one gets no second message in one pass
    refusing = Block.load("custom-webhook/retraining")
    refusing.secrets = {"address": inbox.address("take")}
    refusing.save(overwrite=True)

    def look_again(outbox: Outbox) -> None:
        outbox.retry()
        outbox.send([message("a"), message("b"), message("c")])

    in_outbox(store, look_again)
    in_outbox(store, look_again)
    assert sorted(inbox.subjects()) == sorted(2 * ["Failed: a", "Failed: b", "Failed: c"])
    assert record(store, "a").owed == []
    assert TOKEN.encode() not in b"".join(store.get(name) for name in store.names(""))


def test_a_message_that_nobody_took_is_not_recorded_and_sent_again(
    store: Store, inbox: Inbox
) -> None:
    save(inbox, "refuse", "retraining")
    in_outbox(store, lambda outbox: outbox.send([message("a")]))
    assert store.names("") == []
    in_outbox(store, lambda outbox: outbox.send([message("a")]))
    assert len(inbox.paths) == 2


def test_an_address_that_hangs_holds_nobody_up_for_longer_than_its_limit(
    store: Store, inbox: Inbox
) -> None:
    save(inbox, "hang", "retraining-hanging")
    save(inbox, "take", "retraining-team")
    begin = time.monotonic()
    in_outbox(store, lambda outbox: outbox.send([message(key) for key in "abcdef"]))
    assert time.monotonic() - begin < 40  # six messages would be a minute
    assert len(inbox.received) == 6


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
    run = run_deployment("watch/always", parameters={"store": store.address}, timeout=0)
    assert ended(prefect, run).state.name == "Watched"
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


def test_no_worker_is_told_by_the_server_once_however_many_runs_wait(
    prefect: SyncPrefectClient, inbox: Inbox
) -> None:
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
        add(prefect, inbox.address("take"))
        for rule in prefect.read_automations_by_name(f"no-worker-{pool}"):
            prefect.delete_automation(rule.id)
        hasty = timedelta(seconds=10)  # the least that Prefect allows
        keep_rules(prefect, known_to_server(find_recipients(prefect)), hasty)
        for _ in range(2):
            prefect.create_flow_run_from_deployment(deployment)
        subject = f"No worker in pool {pool}"
        assert inbox.wait_for(2, seconds=120)[1:] == [subject]
        prefect.create_flow_run_from_deployment(deployment)
        time.sleep(45)  # in which the third is late as well, for longer than the rule waits
        assert inbox.subjects()[1:] == [subject]
        assert "/runs/flow-run/" in inbox.received[1]["body"]
    finally:
        prefect.delete_deployment(deployment)
        prefect.delete_work_pool(pool)
