"""Preflight check of the services that a run needs, before it spends any compute."""

import os
from http import HTTPStatus

from tasks.services.addresses import without_credentials
from tasks.services.s3 import Store
from tasks.services.step import step

_HEALTH_SECONDS = 10


class TrackingUnreachable(ConnectionError):
    """The MLflow server does not respond; worth another try."""


class TrackingRefused(PermissionError):
    """The MLflow server refuses these credentials; waiting does not help."""


class TrackingUnset(ValueError):
    """`MLFLOW_TRACKING_URI` names no server; waiting does not help."""


@step
def check_services(store: str) -> None:
    """Write to and read from `store`, and request the health of the MLflow server.

    Raises StorageUnreachable, StorageRefused, TrackingUnreachable, TrackingRefused or
    TrackingUnset. Each error names the service, its response, and the remedy.
    """
    check_tracking()
    Store(store).check()


def check_tracking() -> None:
    """Request `/health` from the server of `MLFLOW_TRACKING_URI`, as MLflow's own client would."""
    from mlflow.exceptions import MlflowException
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    address = os.environ.get("MLFLOW_TRACKING_URI", "")
    shown = without_credentials(address)
    if not address.startswith(("http://", "https://")):
        raise TrackingUnset(
            f"MLFLOW_TRACKING_URI is {shown!r}; expected the http(s) address of an MLflow "
            "server: set it where this run executes (`make up` prints the local one)"
        )
    # Credentials come from MLFLOW_TRACKING_USERNAME and the like, or from the address itself. By
    # MLflow's client: its settings for certificates and authentication apply here as well.
    server = get_default_host_creds(address)  # type: ignore[no-untyped-call]
    # One attempt: the task has retries of its own, which wait longer.
    once = {"timeout": _HEALTH_SECONDS, "max_retries": 0, "retry_codes": ()}
    try:
        response = http_request(server, "/health", "GET", **once)  # type: ignore[no-untyped-call]
    except MlflowException as error:
        # Without the cause: it would be logged unchanged, with a password in the address.
        raise _unreachable(shown, str(error)) from None
    if response.status_code in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
        raise TrackingRefused(
            f"the MLflow server at {shown} refuses these credentials ({response.status_code}); "
            "correct MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
            "MLFLOW_TRACKING_TOKEN, where this run executes"
        )
    if not response.ok:
        raise _unreachable(shown, f"{response.status_code} {response.reason}")


def _unreachable(shown: str, reason: str) -> TrackingUnreachable:
    return TrackingUnreachable(
        f"the MLflow server does not answer at {shown.rstrip('/')}/health "
        f"({without_credentials(reason)}); start it (`make up` starts the local one) or correct "
        "MLFLOW_TRACKING_URI"
    )
