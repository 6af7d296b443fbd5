"""The nightly look at every data set that something has arrived for, on the real servers."""

import time

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowFilter, FlowFilterName
from prefect.client.schemas.objects import FlowRun

from deployments.drop import drop
from deployments.stack import Stack
from deployments.tour import begin, sample_parts
from flows.ingest import sweep
from tasks.arrivals.batch_files import write_parquet
from tasks.services.s3 import Store
from tasks.sweep import start_ingests


def ingests_of(*datasets: str) -> list[FlowRun]:
    ingest = FlowFilter(name=FlowFilterName(any_=["ingest"]))  # a training follows what it accepts
    with get_client(sync_client=True) as prefect:
        runs = prefect.read_flow_runs(flow_filter=ingest)
    return [run for run in runs if run.parameters.get("dataset") in datasets]


def test_every_data_set_with_something_in_incoming_is_ingested_and_a_failure_stops_none(
    stack: Stack, store: Store
) -> None:
    parts = sample_parts()
    begin("swept", parts)
    begin("idle", parts)
    batch = {"part.parquet": write_parquet(parts.good)}
    drop("swept", "monday", batch)
    drop("baseless", "monday", batch)
    state = sweep(return_state=True)
    assert state.name == "Swept", state.message
    assert "baseless" in str(state.message)
    assert "swept" in str(state.message)
    assert "idle" not in str(state.message)
    deadline = time.monotonic() + 400
    while not all(run.state and run.state.is_final() for run in ingests_of("swept", "baseless")):
        assert time.monotonic() < deadline
        time.sleep(1)
    ingests = ingests_of("swept", "baseless")
    ends = {run.parameters["dataset"]: run.state and run.state.name for run in ingests}
    assert ends == {"swept": "Batches accepted", "baseless": "Failed"}
    assert not ingests_of("idle")


def test_a_retry_of_the_sweep_makes_no_second_run(stack: Stack) -> None:
    @flow
    def twice() -> None:
        for _ in range(2):
            assert start_ingests(["digits"], "s3://mnist-retraining/swept-twice")[0] == ["digits"]

    twice()
    with get_client(sync_client=True) as prefect:
        runs = prefect.read_flow_runs()
    place = "s3://mnist-retraining/swept-twice"
    assert len([run for run in runs if run.parameters.get("store") == place]) == 1
