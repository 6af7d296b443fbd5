"""Which stack a command means."""

from pathlib import Path

import pytest

from deployments.services import Ports, Stack, environment, inherited_environment
from deployments.watch import is_local, missing_services
from tasks.services.s3 import default_store

STACK = Stack(Path("/nowhere"), Ports(prefect=4217))


@pytest.mark.parametrize(
    "url", [None, "", "http://127.0.0.1:4217/api", "http://localhost:4217/api/"]
)
def test_the_local_stack_is_meant_if_nothing_or_its_own_address_is_named(url: str | None) -> None:
    assert is_local(url, STACK)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:4200/api", "https://prefect.example.org/api", "http://10.0.0.1:4217"]
)
def test_another_address_means_the_callers_own_services(url: str) -> None:
    assert not is_local(url, STACK)


def test_services_that_are_not_named_are_told() -> None:
    named = {"MLFLOW_TRACKING_URI": "https://mlflow", "AWS_PROFILE": "ours"}
    assert missing_services(named) is None
    told = missing_services({})
    assert told
    assert "MLFLOW_TRACKING_URI" in told


def test_one_variable_names_the_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RETRAINING_STORE", "s3://ours/mnist")
    assert default_store() == "s3://ours/mnist"
    local = Stack(tmp_path, Ports())
    assert environment(local)["RETRAINING_STORE"] == "s3://mnist-retraining"
    assert inherited_environment(local)["RETRAINING_STORE"] == "s3://mnist-retraining"
