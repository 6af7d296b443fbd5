"""Ask every service that a run will need, before the run spends anything."""

import os
from http.client import HTTPException
from urllib.request import urlopen

from tasks.services.s3 import Store
from tasks.services.step import step


class TrackingUnreachable(ConnectionError):
    """The MLflow server does not answer; worth another try."""


class TrackingUnset(ValueError):
    """`MLFLOW_TRACKING_URI` names no server; waiting does not help."""


@step
def check_services(store: str) -> None:
    """Write to and read from `store`, and ask the MLflow server how it is.

    Raises StorageUnreachable, StorageRefused, TrackingUnreachable or TrackingUnset, each naming the
    service, what it answered and what to start or set.
    """
    check_tracking()
    Store(store).check()


def check_tracking() -> None:
    """Ask the MLflow server of `MLFLOW_TRACKING_URI` for its health."""
    address = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not address.startswith(("http://", "https://")):
        raise TrackingUnset(
            f"MLFLOW_TRACKING_URI is {address!r}; expected the http(s) address of an MLflow "
            "server: set it where this run executes (`make up` prints the local one)"
        )
    health = f"{address.rstrip('/')}/health"
    try:
        with urlopen(health, timeout=10) as answer:  # noqa: S310 - the scheme was just checked
            answer.read()
    except (OSError, HTTPException) as error:
        raise TrackingUnreachable(
            f"the MLflow server does not answer at {health} ({error}); start it "
            "(`make up` starts the local one) or correct MLFLOW_TRACKING_URI"
        ) from error
