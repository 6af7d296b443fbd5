"""Preflight check of the services that a run needs, before it spends any compute."""

from tasks.services.mlflow import check_tracking
from tasks.services.s3 import Store
from tasks.services.step import step


@step
def check_services(store: str) -> None:
    """Write to and read from `store`, and request the health of the MLflow server.

    Raises StorageUnreachable, StorageRefused, TrackingUnreachable, TrackingRefused or
    TrackingUnset. Each error names the service, its response, and the remedy.
    """
    check_tracking()
    Store(store).check()
