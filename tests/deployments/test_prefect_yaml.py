"""Every deployment names a flow that exists and parameters that it accepts."""

import pytest
import yaml
from prefect.utilities.importtools import import_object

from deployments.stack import PROJECT

DEPLOYMENTS = yaml.safe_load((PROJECT / "deployments" / "prefect.yaml").read_text())["deployments"]


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda d: d["name"])
def test_the_entrypoint_is_a_flow_that_takes_the_parameters(deployment: dict) -> None:
    flow = import_object(deployment["entrypoint"])
    given = deployment.get("parameters", {})
    form = flow.parameters.model_dump()
    assert given.keys() <= form["properties"].keys()
    if given.keys() >= set(form["required"]):  # the rest is what a person has to fill in
        assert flow.validate_parameters(given) is not None
    else:
        assert not deployment.get("schedules")
    assert deployment["description"]
    assert deployment["tags"]


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda d: d["name"])
def test_no_deployment_repeats_a_default(deployment: dict) -> None:
    flow = import_object(deployment["entrypoint"])
    defaults = flow.parameters.model_dump()["properties"]
    for name, value in deployment.get("parameters", {}).items():
        assert value != defaults[name].get("default")


def test_the_weekly_run_is_scheduled_in_a_time_zone_and_never_twice_at_once() -> None:
    (weekly,) = (d for d in DEPLOYMENTS if d["entrypoint"] == "flows.train.train")
    assert weekly["name"] == "weekly"
    assert weekly["schedules"][0].keys() >= {"cron", "timezone"}
    assert weekly["concurrency_limit"] == {"limit": 1, "collision_strategy": "CANCEL_NEW"}
