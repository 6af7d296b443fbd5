"""A data set's own schedule: what is refused, what is warned of, and what Prefect makes of it."""

import asyncio
from collections.abc import Iterator
from datetime import UTC, date, datetime, time, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.server.schemas.schedules import CronSchedule

from deployments.deploy import deploy
from deployments.due import Due, Unscheduled, read_due, wait_for_runs
from deployments.schedule import (
    check_dataset,
    clock_change_warnings,
    present_rule,
    read_rule,
    remove_schedule,
    set_schedule,
)
from deployments.services import StackError
from deployments.stack import PROJECT, Stack, prefect_api
from deployments.tour import begin, sample_parts

YAML = PROJECT / "deployments" / "prefect.yaml"

CHANGES = [
    ("Europe/Berlin", date(2027, 3, 28)),
    ("Europe/Berlin", date(2027, 10, 31)),
    ("America/New_York", date(2027, 3, 14)),
    ("America/New_York", date(2027, 11, 7)),
]
"""Sundays of 23 or 25 hours."""


@pytest.mark.parametrize(("zone", "day"), CHANGES)
@pytest.mark.parametrize("days", ["*", "0"], ids=["nightly", "weekly"])
@pytest.mark.parametrize("hour", range(5))
def test_the_day_on_which_the_clocks_change_has_one_run(
    zone: str, day: date, days: str, hour: int
) -> None:
    midnight = datetime.combine(day, time(), ZoneInfo(zone))
    rule = CronSchedule(cron=f"30 {hour} * * {days}", timezone=zone)
    dates = asyncio.run(rule.get_dates(n=10, start=midnight, end=midnight + timedelta(days=1)))
    assert [each.astimezone(ZoneInfo(zone)).date() for each in dates] == [day]


def test_the_schedules_of_prefect_yaml_run_once_when_the_clocks_change_anywhere() -> None:
    file = yaml.safe_load(YAML.read_text())
    for entry in (s for d in file["deployments"] for s in d.get("schedules", [])):
        if not entry["cron"].startswith("*/"):
            for zone in ("Europe/Berlin", "America/New_York", "Africa/Cairo", "Pacific/Auckland"):
                assert clock_change_warnings(read_rule(entry["cron"], zone)) == []


def test_two_times_that_the_change_makes_one_are_warned_of_with_the_date() -> None:
    warnings = clock_change_warnings(read_rule("0 2,3 * * *", "Europe/Berlin"))
    assert len(warnings) == 2  # springs of two years
    assert "March" in warnings[0]
    assert "1 instead of 2 runs" in warnings[0]


MALFORMED = ["61 3 * * *", "every monday", "0 3 * *", "R 3 * * *", "; ls", "@weekly 3", "@never"]
QUARTZ = ["0 0 3 * * 1", "0 3 * * 1 */5", "0 0 3 ? * 1 2027"]
"""Crons with seconds or years, which no two programs read alike."""


@pytest.mark.parametrize("cron", MALFORMED + QUARTZ)
def test_a_malformed_cron_is_refused_with_an_example(cron: str) -> None:
    with pytest.raises(StackError, match=r"is no cron expression; expected .* '0 3 \* \* 1'"):
        read_rule(cron, None)


def test_a_word_for_a_rule_is_taken() -> None:
    assert read_rule("@weekly", None).cron == "@weekly"


def test_a_date_that_never_comes_is_refused() -> None:
    with pytest.raises(StackError, match=r"'0 3 31 2 .*never comes"):
        read_rule("0 3 31 2 *", None)


def test_a_day_of_many_runs_is_counted_whole() -> None:
    spring = clock_change_warnings(read_rule("* * * * *", "Europe/Berlin"))
    assert len(spring) == 2  # in autumn the doubled hour has the runs of one
    assert "1380 instead of 1440 runs" in spring[0]


NOWHERE = ["Europe/Berlim", "Berlin", "+01:00", "../etc/passwd", "localtime", "Factory"]


@pytest.mark.parametrize("zone", NOWHERE)
def test_an_unknown_time_zone_is_refused(zone: str) -> None:
    with pytest.raises(StackError, match="there is no time zone"):
        read_rule(None, zone)


def test_without_a_rule_the_week_is_that_of_prefect_yaml() -> None:
    rule = read_rule(None, None)
    assert (rule.cron, rule.timezone) == ("0 3 * * 1", "Etc/UTC")


def test_what_is_not_given_is_taken_from_the_schedule_that_exists() -> None:
    present = {"cron": "0 4 * * 2", "timezone": "Europe/Berlin", "day_or": False}
    for given, taken in [
        (("0 5 * * 2", None), ("0 5 * * 2", "Europe/Berlin", True)),
        ((None, "Asia/Tokyo"), ("0 4 * * 2", "Asia/Tokyo", False)),
        ((None, None), ("0 4 * * 2", "Europe/Berlin", False)),
    ]:
        rule = read_rule(*given, present)
        assert (rule.cron, rule.timezone, rule.day_or) == taken


def test_a_zone_alone_does_not_make_an_interval_a_week() -> None:
    present = {"interval": 3600.0, "timezone": "UTC"}
    with pytest.raises(StackError, match="expected CRON as well"):
        read_rule(None, "Europe/Berlin", present)
    assert read_rule("0 4 * * 2", None, present).cron == "0 4 * * 2"


def test_auto_gets_no_week_of_its_own() -> None:
    with pytest.raises(StackError, match="expected the name of one of them: mnist"):
        check_dataset("auto")


@pytest.mark.parametrize("store", ["mybucket", "s3://my bucket"])
def test_a_store_that_is_no_address_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    monkeypatch.setenv("RETRAINING_STORE", store)
    with pytest.raises(StackError, match="s3://BUCKET or s3://BUCKET/PREFIX"):
        check_dataset("own")


def test_a_date_beyond_the_servers_horizon_is_not_missed() -> None:
    far = datetime.now(UTC) + timedelta(days=200)
    yearly = {"cron": f"0 0 {far.day} {far.month} *", "timezone": "UTC"}
    never = {"cron": "0 0 31 2 *", "timezone": "UTC"}
    daily = {"cron": "0 0 * * *", "timezone": "UTC"}
    missing = [
        Due("a/b", "c", "", rule, active=True, when=None).missing()
        for rule in (yearly, never, daily)
    ]
    assert missing == [False, False, True]


def test_a_server_that_makes_no_runs_is_told_in_a_sentence() -> None:
    deployment = {
        "id": "1",
        "flow_id": "2",
        "name": "weekly",
        "paused": False,
        "parameters": {},
        "parameter_openapi_schema": {},
        "schedules": [
            {
                "id": "3",
                "slug": "weekly",
                "active": True,
                "parameters": {},
                "schedule": {"cron": "0 3 * * 1", "timezone": "UTC"},
            }
        ],
    }
    answers: dict[str, Any] = {
        "/flows/filter": [{"id": "2", "name": "train"}],
        "/deployments/filter": [deployment],
        "/flow_runs/filter": [],
    }
    with pytest.raises(Unscheduled, match="no run within 0 s for the schedule `weekly` of train"):
        wait_for_runs(lambda _method, path, _content: answers[path], patience=0)


@pytest.fixture
def prefect(stack: Stack) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as prefect:
        yield prefect


def test_a_data_set_that_does_not_exist_is_refused_with_what_is_missing(stack: Stack) -> None:
    with pytest.raises(StackError, match=r"datasets/nowhere/base/ lacks train-images"):
        check_dataset("nowhere")
    with pytest.raises(StackError, match="'No where' is no name of a data set"):
        check_dataset("No where")
    for known in ("mnist", "digits"):
        check_dataset(known)


def test_a_data_set_gets_its_own_week_which_is_replaced_and_removed(
    stack: Stack, prefect: SyncPrefectClient
) -> None:
    begin("week-of-its-own", sample_parts())
    check_dataset("week-of-its-own")
    set_schedule(prefect, "week-of-its-own", read_rule("0 4 * * 2", "Europe/Berlin"))
    present = present_rule(prefect, "week-of-its-own")
    set_schedule(prefect, "week-of-its-own", read_rule("0 5 * * 2", None, present))
    with prefect_api(stack) as ask:
        (due,) = (due for due in wait_for_runs(ask) if due.dataset == "week-of-its-own")
        assert due.deployment == "train/weekly"
        assert due.when
        assert due.when.astimezone(ZoneInfo("Europe/Berlin")).strftime("%a %H:%M") == "Tue 05:00"
        remove_schedule(prefect, "week-of-its-own")
        assert "week-of-its-own" not in [due.slug for due in read_due(ask)]
    with pytest.raises(StackError, match="has no schedule of the data set week-of-its-own"):
        remove_schedule(prefect, "week-of-its-own")


def test_a_data_set_that_a_schedule_trains_already_gets_no_second_week(
    stack: Stack, prefect: SyncPrefectClient
) -> None:
    """`weekly` trains mnist, by the default of the flow."""
    try:
        set_schedule(prefect, "mnist", read_rule("0 5 * * 2", None))
        with prefect_api(stack) as ask:
            (due,) = (due for due in read_due(ask) if due.deployment == "train/weekly")
            assert (due.slug, due.dataset, due.rule["cron"]) == ("weekly", "mnist", "0 5 * * 2")
            said = list[str]()
            deploy(ask, stack, YAML, say=said.append)
            (due,) = (due for due in read_due(ask) if due.deployment == "train/weekly")
            assert due.rule["cron"] == "0 5 * * 2"
            assert "'0 5 * * 2' Etc/UTC with {'dataset': 'mnist'} on the server" in said[0]
            remove_schedule(prefect, "mnist")
            assert "train/weekly" not in [due.deployment for due in read_due(ask)]
    finally:
        with prefect_api(stack) as ask:
            deploy(ask, stack, YAML, reset=True, say=print)


def test_a_schedule_of_prefect_yaml_is_no_data_sets(
    stack: Stack, prefect: SyncPrefectClient
) -> None:
    with pytest.raises(StackError, match="give the data set another name"):
        set_schedule(prefect, "weekly", read_rule(None, None))
    with pytest.raises(StackError, match="has no schedule of the data set weekly"):
        remove_schedule(prefect, "weekly")
