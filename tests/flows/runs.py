"""Flow runs that a test makes, lets die and goes on with, without a worker."""

from typing import Any
from uuid import UUID

from prefect import Flow
from prefect.client.orchestration import get_client
from prefect.client.schemas import State
from prefect.flow_engine import run_flow
from prefect.states import AwaitingRetry


def create_run(flow: Flow[..., Any], **parameters: object) -> UUID:
    with get_client(sync_client=True) as prefect:
        return prefect.create_flow_run(flow, parameters=parameters).id


def execute(flow: Flow[..., Any], run_id: UUID) -> State:
    """Execute a flow run in this process, as a worker's child does; return its last state."""
    with get_client(sync_client=True) as prefect:
        run = prefect.read_flow_run(run_id)
    state = run_flow(flow, flow_run=run, return_type="state")
    assert isinstance(state, State)
    return state


def retry(flow: Flow[..., Any], run_id: UUID) -> State:
    """Do what a typed retry does, or the resume of a run that died."""
    with get_client(sync_client=True) as prefect:
        prefect.set_flow_run_state(run_id, AwaitingRetry(), force=True)
    return execute(flow, run_id)
