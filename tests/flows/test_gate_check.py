"""Every planted fault meets the real gates, and nothing that was planted stays."""

from collections.abc import Iterator

import pytest
from mlflow import MlflowClient
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

from deployments.stack import Stack
from flows.gate_check import check_gates
from flows.train import train
from tasks.datasets.catalog import KNOWN
from tasks.promote import find_champion
from tasks.services.s3 import Store

PLACE = "s3://mnist-retraining/tests/gates"


@pytest.fixture(scope="module")
def champion(stack: Stack) -> Iterator[None]:
    quick = {"preset": "quick"}
    assert train("digits", quick, store=PLACE, return_state=True).name == "Promoted"
    yield
    MlflowClient().delete_registered_model("digits-cnn")


def registered() -> list[tuple[str, str]]:
    return [(v.name, v.version) for v in MlflowClient().search_model_versions()]


def kept() -> list[str]:
    """Name what lies in the store, but for the outcomes that the checks themselves record."""
    return [name for name in Store(PLACE).names("") if not name.endswith("/outcome.json")]


def test_every_gate_holds_and_nothing_that_was_planted_stays(champion: None) -> None:
    before = (find_champion.fn("digits-cnn"), registered(), kept())
    state = check_gates("digits", store=PLACE, return_state=True)
    assert state.name == "Gates hold", state.message
    assert (find_champion.fn("digits-cnn"), registered(), kept()) == before
    run = ArtifactFilterFlowRunId(any_=[state.state_details.flow_run_id])
    with get_client(sync_client=True) as prefect:
        artifacts = prefect.read_artifacts(artifact_filter=ArtifactFilter(flow_run_id=run))
    table = str(next(artifact.data for artifact in artifacts if artifact.key == "gates"))
    for planted in (
        "labels of one digit shuffled",
        "blind to one digit",
        "better overall, worse under noise",
        "over-confident",
        "slow",
        "a tie",
        "newer, and a little less accurate",
        "truncated model file",
        "half of the training labels shuffled",
        "test images among the training images",
    ):
        assert planted in table


def test_a_policy_with_a_hole_is_found_open_and_still_nothing_stays(champion: None) -> None:
    """A team that gives up the latency's ceiling lets the slow model in."""
    before = kept()
    policy = KNOWN["digits"].policy
    assert policy
    holed = policy.model_copy(update={"latency_ceiling_ms": 1e6})
    state = check_gates("digits", promotion=holed, store=PLACE, return_state=True)
    assert state.is_failed()
    assert state.name == "A gate is open"
    assert str(state.message).startswith("slow: ")
    assert kept() == before


def test_without_a_champion_there_is_nothing_to_check(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.gate_check.find_champion", lambda _: None)
    state = check_gates("digits", store=PLACE, return_state=True)
    assert state.name == "No champion"
    assert "run train/weekly" in str(state.message)
