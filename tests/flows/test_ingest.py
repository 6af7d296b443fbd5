"""The ingest flow through real servers: what it ends in, and what it shows."""

import gzip

import numpy as np
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas import State
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

from deployments.stack import Stack
from flows.ingest import compare, ingest
from mnist_cnn.digits import Digits
from mnist_cnn.idx import write_idx
from mnist_cnn.sample import embedded_sample
from tasks.datasets.catalog import KNOWN
from tasks.datasets.ledger import present_snapshot, read_base, read_ledger
from tasks.records import Snapshot
from tasks.services.s3 import Store
from tests.flows.runs import create_run, execute, retry

PLACE = "s3://mnist-retraining/tests/ingest-flow"
SAMPLE = embedded_sample()[0]


def drop(batch: str, digits: Digits, place: str = PLACE) -> None:
    folder = f"datasets/digits/incoming/{batch}/"
    for name, content in {
        "x-images-idx3-ubyte.gz": gzip.compress(write_idx(digits.images)),
        "x-labels-idx1-ubyte.gz": gzip.compress(write_idx(digits.labels.astype(np.uint8))),
        "_SUCCESS": b"",
    }.items():
        Store(place).put(folder + name, content)


def present() -> Snapshot:
    store = Store(PLACE)
    base = read_base(store, "digits")
    assert base
    return present_snapshot(store, base, read_ledger(store, "digits"))


def shown(state: State) -> dict[str, str]:
    run = ArtifactFilterFlowRunId(any_=[state.state_details.flow_run_id])
    with get_client(sync_client=True) as prefect:
        artifacts = prefect.read_artifacts(artifact_filter=ArtifactFilter(flow_run_id=run))
    return {str(artifact.key): str(artifact.data) for artifact in artifacts}


@pytest.fixture(scope="module")
def grown(stack: Stack) -> tuple[Snapshot, State, Snapshot]:
    """Return a data set before and after two batches, and the state of the ingest between."""
    assert ingest("digits", store=PLACE, return_state=True).name == "No batch"
    before = present()
    moved = np.roll(SAMPLE.images[:400], 1, axis=2)
    drop("bright", Digits(255 - moved, SAMPLE.labels[:400]))
    drop("dark", Digits(moved, SAMPLE.labels[:400]))
    state = ingest("digits", store=PLACE, return_state=True)
    return before, state, present()


def test_a_bad_batch_and_a_good_one_end_accepted_and_are_both_told(
    grown: tuple[Snapshot, State, Snapshot],
) -> None:
    _, state, _ = grown
    assert state.name == "Batches accepted", state.message
    assert "1 accepted; 'bright' quarantined" in str(state.message)
    table = shown(state)["batches"]
    assert "quarantine/000001-bright" in table
    assert "accepted/000002-dark" in table
    assert "report.html?" in table


def test_two_snapshots_are_compared_by_what_came_in_and_what_it_changed(
    grown: tuple[Snapshot, State, Snapshot],
) -> None:
    before, _, after = grown
    state = compare(before.digest, after.digest, "digits", store=PLACE, return_state=True)
    assert state.name == "Compared"
    assert "1,438 training images became 1,838" in str(state.message)
    tables = shown(state)
    assert "batch dark" in tables["came-in-train"]
    assert "stroke width" in tables["changes"]
    assert "digit 7" in tables["changes"]


def test_bad_data_at_the_beginning_is_no_beginning(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, (train, test) = f"{PLACE}-bad", embedded_sample()
    bad = Digits(255 - train.images, train.labels)
    entry = KNOWN["digits"].model_copy(update={"fetch": lambda: (bad, test)})
    monkeypatch.setitem(KNOWN, "digits", entry)
    state = ingest("digits", store=place, return_state=True)
    assert state.is_failed()
    assert state.name == "Data rejected"
    assert read_base(Store(place), "digits") is None


@pytest.mark.parametrize("last", ["report_ingest", "Completed"])
def test_a_run_that_dies_after_it_accepted_a_batch_ends_as_if_it_had_not(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    place = f"{PLACE}-dies-before-{last}"
    drop("first", Digits(np.roll(SAMPLE.images[:400], 1, axis=2), SAMPLE.labels[:400]), place)
    run = create_run(ingest, dataset="digits", store=place)
    with monkeypatch.context() as fault:
        fault.setattr(f"flows.ingest.{last}", lambda *_, **__: 1 / 0)
        assert execute(ingest, run).is_failed()
    second = Digits(np.roll(SAMPLE.images[400:800], 1, axis=2), SAMPLE.labels[400:800])
    if last == "Completed":  # this run took in what it did; what came since is for another
        drop("second", second, place)
    state = retry(ingest, run)
    assert (state.name, state.message) == ("Batches accepted", "1 accepted")
    (verdict,) = read_ledger(Store(place), "digits")
    assert (verdict.batch, verdict.accepted, verdict.run) == ("first", True, str(run))
