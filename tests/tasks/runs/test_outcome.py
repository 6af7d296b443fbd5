"""A flow that has ended does nothing again, and one that failed does."""

from inspect import unwrap
from pathlib import Path

import pytest
from prefect import Flow, flow
from prefect.client.schemas import State
from prefect.states import Completed, Failed
from prefect.utilities.callables import parameter_schema

from flows.gate_check import check_gates
from flows.ingest import ingest
from flows.promote import judge, roll_back
from flows.retain import retain
from flows.train import train
from tasks.runs.outcome import Outcome, once
from tasks.services.s3 import Store
from tests.flows.runs import create_run, execute, retry

GOLDEN = Path(__file__).parents[2] / "golden" / "outcome-1.json"

ends: list[State] = []
"""What the flow below is about to end in, the next one last."""


@flow
@once
def ending(what: str, *, store: str) -> State:
    """Leave an object in the store, and end.

    Args:
        what: Name of the object.
        store: Where it is put.

    """
    place = Store(store)
    place.put(f"{what}-{len(place.names(what)) + 1}", b"")
    return ends.pop()


def test_a_run_that_completed_returns_the_same_state_and_does_nothing(store: Store) -> None:
    ends[:] = [Completed(name="Promoted", message="it is better")]
    run = create_run(ending, what="a", store=store.address)
    first = execute(ending, run)
    again = retry(ending, run)
    assert (again.type, again.name, again.message) == (first.type, "Promoted", "it is better")
    assert store.names("a") == ["a-1"]


def test_a_run_that_failed_is_tried_again(store: Store) -> None:
    ends[:] = [Completed(name="Skipped"), Failed(name="Data rejected", message="labels")]
    run = create_run(ending, what="a", store=store.address)
    assert execute(ending, run).name == "Data rejected"
    assert retry(ending, run).name == "Skipped"
    assert store.names("a") == ["a-1", "a-2"]


def test_a_run_that_died_between_its_record_and_its_state_ends_in_that_state(store: Store) -> None:
    run = create_run(ending, what="a", store=store.address)
    store.put(f"runs/{run}/outcome.json", GOLDEN.read_bytes())
    assert execute(ending, run).name == "Promoted"
    assert store.names("a") == []


def test_another_run_is_another_matter(store: Store) -> None:
    ends[:] = [Completed(name="Skipped"), Completed(name="Promoted")]
    assert ending("a", store=store.address, return_state=True).name == "Promoted"
    assert ending("a", store=store.address, return_state=True).name == "Skipped"


@pytest.mark.parametrize("content", [b"", b"{}", b'{"format": 2}'])
def test_a_record_that_cannot_be_read_stops_the_run(store: Store, content: bytes) -> None:
    ends[:] = [Completed(name="Promoted")]
    run = create_run(ending, what="a", store=store.address)
    store.put(f"runs/{run}/outcome.json", content)
    state = execute(ending, run)
    assert state.is_failed()
    assert f"runs/{run}/outcome.json is no record that this version" in str(state.message)
    assert store.names("a") == []


def test_the_golden_outcome_of_format_1_loads() -> None:
    state = Outcome.model_validate_json(GOLDEN.read_bytes()).state
    assert state.is_completed()
    assert state.name == "Promoted"
    assert str(state.message).startswith("no champion: the first model")


@pytest.mark.parametrize("ours", [train, ingest, judge, roll_back, retain, check_gates, ending])
def test_the_form_of_a_flow_is_that_of_its_function(ours: Flow[..., State]) -> None:
    plain = flow(unwrap(ours.fn))
    assert unwrap(ours.fn) is not ours.fn
    assert parameter_schema(ours.fn) == parameter_schema(plain.fn)
    assert ours.description == plain.description
    assert ours.parameters.properties["store"]["description"]
