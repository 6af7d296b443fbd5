"""Every deployment names a flow that exists and parameters that it accepts."""

from typing import Any
from uuid import UUID

import pytest
import yaml
from prefect.cli.deploy._triggers import _initialize_deployment_triggers
from prefect.server.events.schemas.automations import AutomationCore
from prefect.utilities.importtools import import_object

from deployments.due import TAG
from deployments.stack import PROJECT

Entry = dict[str, Any]
FILE = PROJECT / "deployments" / "prefect.yaml"
DEPLOYMENTS: list[Entry] = yaml.safe_load(FILE.read_text())["deployments"]


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda d: d["name"])
def test_the_entrypoint_is_a_flow_that_takes_the_parameters(deployment: Entry) -> None:
    flow = import_object(deployment["entrypoint"])
    given = deployment.get("parameters", {})
    form = flow.parameters.model_dump()
    assert given.keys() <= form["properties"].keys()
    if given.keys() >= set(form["required"]):  # the rest is what a person has to fill in
        assert flow.validate_parameters(given) is not None
    else:
        assert not deployment.get("schedules")
    assert deployment["description"]
    assert TAG in deployment["tags"]


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda d: d["name"])
def test_no_deployment_repeats_a_default(deployment: Entry) -> None:
    flow = import_object(deployment["entrypoint"])
    defaults = flow.parameters.model_dump()["properties"]
    for name, value in deployment.get("parameters", {}).items():
        assert value != defaults[name].get("default")


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda d: d["name"])
def test_a_run_is_patient_and_sends_a_heartbeat_every_30_seconds(deployment: Entry) -> None:
    variables = deployment["work_pool"]["job_variables"]["env"]
    assert variables["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"
    pauses = [2**attempt for attempt in range(1, 1 + int(variables["PREFECT_CLIENT_MAX_RETRIES"]))]
    assert sum(pauses) > 600
    assert "name" not in deployment["work_pool"]  # PREFECT_DEFAULT_WORK_POOL_NAME chooses it


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda d: d["name"])
def test_no_run_holds_a_slot(deployment: Entry) -> None:
    assert "concurrency_limit" not in deployment


@pytest.mark.parametrize("schedule", [s for d in DEPLOYMENTS for s in d.get("schedules", [])])
def test_a_schedule_has_a_name_and_a_time_zone(schedule: Entry) -> None:
    assert schedule.keys() >= {"slug", "timezone", "active"}


def test_the_weekly_run_is_scheduled() -> None:
    assert only("flows.train.train/weekly")["schedules"][0]["active"]


def only(deployment: str) -> Entry:
    (found,) = (d for d in DEPLOYMENTS if f"{d['entrypoint']}/{d['name']}" == deployment)
    return found


def test_ten_arrivals_of_a_data_set_make_one_ingest_once_it_is_quiet() -> None:
    (arrivals,) = only("flows.ingest.ingest/on-arrival")["triggers"]
    assert arrivals["posture"] == "Proactive"
    assert arrivals["after"] == arrivals["expect"] == ["batch.arrived"]
    assert arrivals["for_each"] == ["prefect.resource.id"]
    assert arrivals["within"] >= 10  # Prefect allows no less


def test_training_begins_when_a_run_of_on_arrival_accepted_something_and_not_otherwise() -> None:
    (accepted,) = only("flows.train.train/weekly")["triggers"]
    assert accepted["expect"] == ["prefect.flow-run.Batches accepted"]
    assert accepted["match_related"] == [
        {"prefect.resource.id": "prefect.tag.mnist-retraining"},
        {"prefect.resource.role": "deployment", "prefect.resource.name": "on-arrival"},
    ]
    assert import_object("flows.ingest.ingest").parameters.properties.keys() <= (
        import_object("flows.train.train").parameters.properties.keys()
    )


def test_producers_that_say_nothing_are_served_by_a_schedule() -> None:
    assert only("flows.ingest.sweep/nightly")["schedules"][0]["active"]


@pytest.mark.parametrize("trigger", [t for d in DEPLOYMENTS for t in d.get("triggers", [])])
def test_a_trigger_is_one_that_prefect_accepts(trigger: Entry) -> None:
    (made,) = _initialize_deployment_triggers("any", [trigger])
    made.set_deployment_id(UUID(int=0))
    assert AutomationCore.model_validate(made.as_automation().model_dump()).name == trigger["name"]
