"""The next due time of each schedule of this project, read from the Prefect server."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from deployments.columns import columns
from deployments.services import StackError

TAG = "mnist-retraining"
"""Tag of every deployment of deployments/prefect.yaml, and of each of their runs."""

PATIENCE = 90.0  # seconds: the scheduling service of a Prefect server runs every minute

HORIZON = timedelta(days=99)  # a Prefect server creates the runs of the next hundred days

Ask = Callable[[str, str, object], Any]
"""A request to a Prefect server: method, path and JSON content to the response's JSON."""


class Unscheduled(StackError):
    """A schedule is active, but the server creates no run for it."""


@dataclass(frozen=True)
class Due:
    """A schedule and its next run."""

    deployment: str
    slug: str
    dataset: str
    """Empty if the flow has no such parameter, or covers every data set."""
    rule: dict[str, Any]
    active: bool
    when: datetime | None
    """Start of the next run; None if no run was created."""

    @property
    def name(self) -> str:
        """The schedule's name for use in a sentence."""
        return f"the schedule `{self.slug}` of {self.deployment}"

    def missing(self) -> bool:
        """Return True if the schedule should have a next run and has none."""
        return self.active and self.when is None and _within_horizon(self.rule)

    def words(self) -> str:
        """Return the due time for people: the date in the schedule's zone, and the time left."""
        if not self.active:
            return "switched off"
        if self.when is None:
            return "no run made" if self.missing() else "not within three months"
        zone = self.rule.get("timezone") or "UTC"
        local = self.when.astimezone(ZoneInfo(zone))
        return f"{local:%A %d %B %Y, %H:%M} {zone}, {_distance(self.when)}"


def table(schedules: list[Due]) -> str:
    """Return the schedules as lines of text with equal columns, under a headline."""
    rows = [("deployment", "schedule", "data set", "next due")]
    rows += [(due.deployment, due.slug, due.dataset or "-", due.words()) for due in schedules]
    return columns(rows)


def read_due(ask: Ask) -> list[Due]:
    """Return every schedule of the deployments with `TAG`, by deployment, then by slug."""
    ours = {"deployments": {"tags": {"all_": [TAG]}}}
    flows = {flow["id"]: flow["name"] for flow in ask("POST", "/flows/filter", ours)}
    found = [
        due
        for deployment in ask("POST", "/deployments/filter", ours)
        for due in _read_deployment(ask, flows[deployment["flow_id"]], deployment)
    ]
    return sorted(found, key=lambda due: (due.deployment, due.slug))


def wait_for_runs(ask: Ask, patience: float = PATIENCE) -> list[Due]:
    """Wait until each active schedule has its next run; return all schedules.

    Raises Unscheduled after `patience` seconds.
    """
    deadline = time.monotonic() + patience
    while True:
        schedules = read_due(ask)
        missing = [due for due in schedules if due.missing()]
        if not missing:
            return schedules
        if time.monotonic() > deadline:
            which = ", ".join(due.name for due in missing)
            raise Unscheduled(
                f"the Prefect server has made no run within {patience:.0f} s for {which}; "
                "nothing will start by itself until it does"
            )
        time.sleep(1)


def dataset_of(deployment: dict[str, Any], schedule: dict[str, Any]) -> str:
    """Return the data set of a schedule's runs; empty if the flow has no such parameter."""
    # As Prefect does for a run: the schedule's value, else the deployment's, else the default.
    given = deployment["parameters"] | schedule["parameters"]
    properties = (deployment["parameter_openapi_schema"] or {}).get("properties", {})
    return str(given.get("dataset", properties.get("dataset", {}).get("default", "")))


def _read_deployment(ask: Ask, flow: str, deployment: dict[str, Any]) -> list[Due]:
    times = _next_times(ask, deployment)
    return [
        Due(
            deployment=f"{flow}/{deployment['name']}",
            slug=schedule["slug"] or schedule["id"],
            dataset=dataset_of(deployment, schedule),
            rule=schedule["schedule"],
            active=schedule["active"] and not deployment["paused"],
            when=times.get(schedule["id"]),
        )
        for schedule in deployment["schedules"]
    ]


def _next_times(ask: Ask, deployment: dict[str, Any]) -> dict[str, datetime]:
    """Return the start of each schedule's next run, by the schedule's id."""
    wanted = {schedule["id"] for schedule in deployment["schedules"] if schedule["active"]}
    coming = {
        "deployments": {"id": {"any_": [deployment["id"]]}},
        "flow_runs": {
            "state": {"type": {"any_": ["SCHEDULED"]}},
            "expected_start_time": {"after_": datetime.now(UTC).isoformat()},
        },
        "sort": "EXPECTED_START_TIME_ASC",
    }
    times: dict[str, datetime] = {}
    offset = 0
    # Runs come in pages, soonest first. A schedule with many runs can fill pages before the first
    # run of another appears.
    while wanted - times.keys():
        page = ask("POST", "/flow_runs/filter", coming | {"offset": offset})
        for run in page:
            if run["auto_scheduled"] and run["created_by"]:  # not one that a person scheduled
                when = datetime.fromisoformat(run["expected_start_time"])
                times.setdefault(str(run["created_by"]["id"]), when)
        if not page:
            break
        offset += len(page)
    return times


def _within_horizon(rule: dict[str, Any]) -> bool:
    """Return True if the rule has a date so near that the server creates its run by now."""
    # Imported here: Prefect's server code is needed only for an active schedule without a run.
    from prefect.server.schemas.core import DeploymentSchedule

    schedule = DeploymentSchedule.model_validate({"schedule": rule}).schedule
    now = datetime.now(UTC)
    try:
        return bool(asyncio.run(schedule.get_dates(n=1, start=now, end=now + HORIZON)))
    except ValueError:  # a date that never comes, such as the 31st of February
        return False


def _distance(when: datetime) -> str:
    left = when - datetime.now(UTC)
    units = {"day": timedelta(days=1), "hour": timedelta(hours=1), "minute": timedelta(minutes=1)}
    for unit, length in units.items():
        if left >= length:
            number = left // length
            return f"in {number} {unit}{'s' if number > 1 else ''}"
    return "within a minute"
