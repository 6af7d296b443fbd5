"""A challenger is approved, rolled back and told about, by the flows that people start."""

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

import pytest
from mlflow import MlflowClient
from prefect.client.orchestration import get_client
from prefect.client.schemas import State
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName

from deployments.stack import PROJECT, Stack
from flows.promote import judge, roll_back, tell_history
from flows.train import train
from mnist_cnn.promotion import Decision, decide
from tasks import keys
from tasks.evaluate import try_version
from tasks.promote import find_champion, set_champion
from tasks.registry.models import ModelUnusable
from tasks.services.s3 import DEFAULT_STORE, Store
from tests.tasks.versions import make_champion

NAME = "digits-cnn"
PLACE = "s3://mnist-retraining/tests/promote"
"""A place of its own, for history and decisions; the registry is emptied at the end."""


def unsure(*arguments: Any) -> Decision:
    return decide(*arguments).model_copy(update={"verdict": "needs-approval", "reason": "unsure"})


@pytest.fixture(scope="module")
def first(stack: Stack) -> Iterator[list[object]]:
    """Return the comparisons of a run whose champion changes during the first of them."""
    compared: list[object] = []

    def too_late_at_first(*arguments: Any) -> bool:
        compared.append(arguments)
        return len(compared) > 1 and set_champion(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flows.train.set_champion", too_late_at_first)
        assert train("digits", store=PLACE, return_state=True).name == "Promoted"
    yield compared
    MlflowClient().delete_registered_model(NAME)


@pytest.fixture(scope="module")
def awaiting(first: list[object]) -> State:
    """Return the state of a run that made a challenger, version 2, beside champion 1."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tasks.decide.decide", unsure)
        return train("digits", store=PLACE, force=True, return_state=True)


def champion() -> str:
    found = find_champion.fn(NAME)
    assert found
    return found.version


def type_command(deployment: str, **parameters: str) -> subprocess.CompletedProcess[str]:
    """Type the command that is behind `make approve` and its like."""
    command = [sys.executable, "-m", "prefect", "deployment", "run", deployment, "--watch"]
    for name, value in parameters.items():
        command += ["--param", f"{name}={value}"]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)


def runs_of(deployment: str) -> int:
    named = DeploymentFilter(name=DeploymentFilterName(any_=[deployment]))
    with get_client(sync_client=True) as prefect:
        return len(prefect.read_flow_runs(deployment_filter=named))


def test_a_run_whose_champion_changed_meanwhile_starts_over_with_the_same_version(
    first: list[object],
) -> None:
    assert len(first) == 2
    assert champion() == "1"
    assert len(MlflowClient().search_model_versions(f"name = '{NAME}'")) == 1


def test_a_run_that_awaits_approval_links_to_the_form_with_its_version(awaiting: State) -> None:
    assert awaiting.name == "Awaiting approval"
    assert awaiting.is_completed()
    form = urlsplit(str(awaiting.message).rpartition("approve or reject: ")[2])
    with get_client(sync_client=True) as prefect:
        deployment = prefect.read_deployment_by_name("promote/manual")
    assert form.path == f"/deployments/deployment/{deployment.id}/run"
    known = {"model": NAME, "version": 2, "store": PLACE}
    assert json.loads(parse_qs(form.query)["parameters"][0]) == known
    assert MlflowClient().get_registered_model(NAME).aliases["challenger"] == "2"


def test_the_registered_version_links_back_to_everything(awaiting: State) -> None:
    version = MlflowClient().get_model_version(NAME, "2")
    for link in ("Prefect run", "MLflow run", "validation report", "snapshot", "decision record"):
        assert f"[{link}](http" in str(version.description)


@pytest.mark.parametrize(
    ("deployment", "parameters", "sentence"),
    [
        ("promote/manual", {"judgement": "approve", "version": "2", "reason": ""}, "reason"),
        ("promote/manual", {"judgement": "approve", "version": "2"}, "reason"),
        ("promote/manual", {"judgement": "shrug", "version": "2", "reason": "no"}, "judgement"),
        ("promote/manual", {"judgement": "approve", "version": "0", "reason": "no"}, "version"),
        ("promote/rollback", {"reason": " "}, "reason"),
    ],
)
def test_an_incomplete_form_is_refused_before_a_run_exists(
    stack: Stack, deployment: str, parameters: dict[str, str], sentence: str
) -> None:
    before = runs_of(deployment.partition("/")[2])
    typed = type_command(deployment, who="Ada", **parameters)
    assert typed.returncode != 0
    assert sentence in typed.stdout + typed.stderr
    assert runs_of(deployment.partition("/")[2]) == before


def test_approval_rollback_and_history(awaiting: State) -> None:
    approved = judge(
        judgement="approve",
        version=2,
        reason="as good",
        who="Ada",
        model=NAME,
        store=PLACE,
        return_state=True,
    )
    assert approved.name == "Approved"
    assert champion() == "2"

    typed = type_command("promote/rollback", model=NAME, store=PLACE, who="Bob", reason="it drifts")
    assert typed.returncode == 0, typed.stdout + typed.stderr
    assert "Rolled back" in typed.stdout
    assert champion() == "1"

    told = tell_history(model=NAME, store=PLACE, return_state=True)
    assert told.name == "History whole", told.message
    assert str(told.message).startswith("3 moves")

    store = Store(PLACE)
    _, second, last = store.names(keys.history(NAME))
    content = store.get(last)
    store.remove(last)
    assert tell_history(model=NAME, store=PLACE, return_state=True).name == "History whole"
    assert store.get(last) == content

    store.put(second, store.get(second).replace(b"Ada", b"Eve"))
    broken = tell_history(model=NAME, store=PLACE, return_state=True)
    assert broken.is_failed()
    assert broken.name == "History broken"
    assert f"{second} was changed after it was written" in str(broken.message)


@pytest.mark.parametrize("kept", ["confirmed", "from before confirmations were kept"])
def test_an_alias_that_somebody_moves_by_hand_is_told_until_it_is_back(
    stack: Stack, kept: str
) -> None:
    name, store = f"test-{uuid4().hex[:8]}-cnn", Store(DEFAULT_STORE)
    make_champion(name, replaces=make_champion(name))
    if kept != "confirmed":
        for confirmation in store.names(f"models/{name}/carried-out/"):
            store.remove(confirmation)
        assert tell_history(model=name, return_state=True).name == "History whole"
    MlflowClient().set_registered_model_alias(name, "champion", "1")
    broken = tell_history(model=name, return_state=True)
    assert broken.name == "History broken"
    assert broken.message == (
        "after move 2 the champion should be version 2, but was 1: somebody moved the alias past "
        "this history"
    )
    MlflowClient().set_registered_model_alias(name, "champion", "2")
    assert tell_history(model=name, return_state=True).name == "History whole"


def test_a_rollback_to_a_version_that_does_not_exist_fails_with_a_sentence(awaiting: State) -> None:
    state = roll_back(to=9, reason="a guess", who="Ada", model=NAME, store=PLACE, return_state=True)
    assert state.is_failed()
    assert state.name == "Refused"
    assert "has no version 9" in str(state.message)


def test_a_version_that_no_longer_does_what_it_did_is_not_usable(awaiting: State) -> None:
    version = find_champion.fn(NAME)
    assert version
    recorded = MlflowClient().get_model_version(NAME, version.version).tags["accuracy"]
    MlflowClient().set_model_version_tag(NAME, version.version, "accuracy", "0.5")
    try:
        with pytest.raises(ModelUnusable, match=r"had 0\.5000 when it was evaluated"):
            try_version.fn(version, PLACE)
    finally:
        MlflowClient().set_model_version_tag(NAME, version.version, "accuracy", recorded)
