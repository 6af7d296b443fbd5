"""Runs that nobody started, on the real servers."""

import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
from prefect import flow

from deployments.due import Ask, read_due, table
from deployments.stack import Stack, prefect_api
from tasks.services.s3 import Store
from tasks.watch.schedules import restore_schedules

SECONDS = 15


@pytest.fixture
def ask(stack: Stack) -> Iterator[Ask]:
    with prefect_api(stack) as ask:
        yield ask


@pytest.fixture
def soon(ask: Ask) -> Iterator[str]:
    """Return the id of a schedule that is due every few seconds, of a deployment of ours."""
    deployment = ask("GET", "/deployments/name/ingest/on-arrival", None)["id"]
    schedules = f"/deployments/{deployment}/schedules"
    wanted = {
        "schedule": {"interval": SECONDS},
        "parameters": {"dataset": "digits"},
        "slug": "soon",
    }
    (made,) = ask("POST", schedules, [wanted])
    yield made["id"]
    ask("DELETE", f"{schedules}/{made['id']}", None)


def runs_of(ask: Ask, schedule: str) -> list[dict[str, Any]]:
    """Return the runs that a schedule made, the first one first."""
    runs = ask("POST", "/flow_runs/filter", {"sort": "EXPECTED_START_TIME_ASC"})
    return [run for run in runs if (run["created_by"] or {}).get("id") == schedule]


def test_a_run_that_the_schedule_made_goes_through_the_worker_to_its_end(
    ask: Ask, soon: str
) -> None:
    deadline = time.monotonic() + 300
    while not (ended := [run for run in runs_of(ask, soon) if run["state_name"] == "No batch"]):
        assert time.monotonic() < deadline, [run["state"] for run in runs_of(ask, soon)[:3]]
        time.sleep(1)
    assert ended[0]["state_type"] == "COMPLETED"
    assert ended[0]["auto_scheduled"]
    assert ended[0]["parameters"]["dataset"] == "digits"
    assert set(ended[0]["tags"]) == {"auto-scheduled", "mnist-retraining", "data", "on-arrival"}


def test_the_table_shows_when_the_week_is_due(ask: Ask) -> None:
    found = {(due.deployment, due.slug): due for due in read_due(ask)}
    weekly = found["train/weekly", "weekly"]
    assert weekly.when
    assert weekly.when.weekday() == 0
    assert re.search(r"weekly +mnist +Monday \d\d \w+ \d{4}, 03:00 Etc/UTC, in \d", table([weekly]))


def test_a_schedule_that_was_switched_in_the_ui_is_about_its_data_set_again(
    ask: Ask, store: Store
) -> None:
    path = f"/deployments/{ask('GET', '/deployments/name/train/weekly', None)['id']}/schedules"

    def read() -> dict[str, Any]:
        found: dict[str, Any]
        (found,) = (each for each in ask("GET", path, None) if each["slug"] == "switched")
        return found

    @flow
    def mend() -> list[str]:
        return restore_schedules(store.address)

    wanted = {"schedule": {"cron": "0 3 * * 1"}, "slug": "switched"}
    (made,) = ask("POST", path, [{**wanted, "parameters": {"dataset": "switched"}}])
    try:
        ask("PATCH", f"{path}/{made['id']}", {"active": False})  # as the UI does
        assert read()["parameters"] == {}, (
            "the server forgets no more: drop tasks/watch/schedules.py"
        )
        assert mend() == []  # nobody says that it is a data set
        store.put("datasets/switched/base.json", b"{}")
        (sentence,) = mend()
        assert "switched" in sentence
        assert (read()["parameters"], read()["active"]) == ({"dataset": "switched"}, False)
        assert mend() == []
    finally:
        ask("DELETE", f"{path}/{made['id']}", None)
