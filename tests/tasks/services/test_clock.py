"""What runs decide about each other does not depend on the clock of one machine."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, tzinfo
from uuid import UUID, uuid4

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import Crashed, Running, Scheduled

from deployments.stack import Stack
from tasks.runs import turn
from tasks.runs.states import GIVEN_UP
from tasks.services.clock import read_date, server_time
from tasks.services.s3 import Store

HOUR = timedelta(hours=1)


@flow
def waiting() -> None:
    """Stand for a flow whose runs go one after another."""


@pytest.fixture
def prefect(stack: Stack) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as prefect:
        yield prefect


@pytest.fixture(params=[-1, 1], ids=["a day behind", "a day ahead"])
def wrong_clock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    off = timedelta(days=request.param)

    class Wrong(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> "datetime":  # type: ignore[override]
            return datetime.now(tz) + off

    monkeypatch.setattr("tasks.runs.turn.datetime", Wrong)
    monkeypatch.setattr("tasks.services.clock.datetime", Wrong)


def create(prefect: SyncPrefectClient, deployment: UUID, state: State) -> FlowRun:
    due = state if state.is_scheduled() else Scheduled()
    made = prefect.create_flow_run_from_deployment(deployment, state=due)
    if state is not due:
        prefect.set_flow_run_state(made.id, state, force=True)
    return prefect.read_flow_run(made.id)


def test_the_rivals_of_a_run_are_the_same_by_a_wrong_clock(
    prefect: SyncPrefectClient, wrong_clock: None
) -> None:
    flow_id = prefect.create_flow(waiting)
    deployment = prefect.create_deployment(flow_id, f"test-{uuid4().hex[:8]}")
    now = datetime.now(UTC)
    rivals = [
        create(prefect, deployment, Running()),
        create(prefect, deployment, Scheduled(scheduled_time=now - HOUR)),
        create(prefect, deployment, Crashed()),  # it will be resumed
    ]
    create(prefect, deployment, Crashed(name=GIVEN_UP))
    create(prefect, deployment, Scheduled(scheduled_time=now + HOUR))  # the next one's time
    run = create(prefect, deployment, Running())
    found = turn._find_contenders(prefect, deployment)
    assert {each.run.id for each in found} == {run.id, *(rival.id for rival in rivals)}


def test_the_time_is_that_of_the_server(
    prefect: SyncPrefectClient, store: Store, wrong_clock: None
) -> None:
    for told in (server_time(prefect), store.time()):
        assert abs(told - datetime.now(UTC)) < timedelta(seconds=30)


def test_a_date_is_read_as_servers_write_it() -> None:
    end = datetime(2026, 11, 26, 12, 0, 1, tzinfo=UTC)
    for written in ("Thu, 26 Nov 2026 12:00:00 GMT", "Thu, 26 Nov 2026 12:00:00 -0000"):
        assert read_date(written) == end


@pytest.mark.parametrize("header", [None, "", "yesterday", "Thu, 99 Nov 2026 12:00:00 GMT"])
def test_without_a_date_that_can_be_read_our_own_clock_serves(header: str | None) -> None:
    assert abs(read_date(header) - datetime.now(UTC)) < timedelta(seconds=30)
