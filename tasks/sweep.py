"""Sweep the store for arrivals, and start an ingest for each data set that has some."""

import httpx
from prefect import runtime
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError

from tasks import keys
from tasks.services.s3 import Store
from tasks.services.step import step

INGEST = "ingest/on-arrival"


@step
def find_waiting_datasets(store: str) -> list[str]:
    """Return the data sets that have objects under `datasets/NAME/incoming/`."""
    s3 = Store(store)
    return [dataset for dataset in s3.folders(keys.DATASETS) if s3.names(keys.incoming(dataset))]


@step
def start_ingests(datasets: list[str], store: str) -> tuple[list[str], list[str]]:
    """Create a run of `INGEST` for each data set; return the data sets started, and the faults.

    A fault is a sentence on a data set whose run could not be created; the others are started all
    the same. A retry of this flow run creates no second run: the idempotency key of each holds this
    run and the data set.
    """
    started: list[str] = []
    faults: list[str] = []
    for dataset in datasets:
        try:
            run_deployment(
                INGEST,
                parameters={"dataset": dataset, "store": store},
                timeout=0,  # do not wait for the ingest to end
                as_subflow=False,
                idempotency_key=f"{runtime.flow_run.id}-{dataset}",
            )
        except ObjectNotFound:
            faults.append(
                f"{dataset}: there is no deployment {INGEST} on this Prefect server; deploy "
                "deployments/prefect.yaml there"
            )
        except (PrefectHTTPStatusError, httpx.HTTPError) as error:
            faults.append(f"{dataset}: no run of {INGEST} could be made ({error})")
        else:
            started.append(dataset)
    return started, faults
