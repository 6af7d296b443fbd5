"""Start an ingest for each data set that something has arrived for."""

import httpx
from prefect import runtime
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError

from tasks.services.s3 import Store
from tasks.services.step import step

INGEST = "ingest/on-arrival"


@step
def find_waiting_datasets(store: str) -> list[str]:
    """Return the data sets that have objects under `datasets/NAME/incoming/`."""
    place = Store(store)
    return [
        dataset
        for dataset in place.folders("datasets/")
        if "incoming" in place.folders(f"datasets/{dataset}/")
    ]


@step
def start_ingests(datasets: list[str], store: str) -> tuple[list[str], list[str]]:
    """Make a run of `INGEST` for each data set; return those started, and a sentence a fault.

    A retry of this flow run makes no second run: each has a key of this run and its data set.
    """
    started, faults = list[str](), list[str]()
    for dataset in datasets:
        try:
            run_deployment(
                INGEST,
                parameters={"dataset": dataset, "store": store},
                timeout=0,
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
