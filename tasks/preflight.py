"""Ask every service that a run will need, before the run spends anything."""

import os
from http import HTTPStatus

from tasks.services.addresses import without_credentials
from tasks.services.s3 import Store
from tasks.services.step import step

_HEALTH_SECONDS = 10


class TrackingUnreachable(ConnectionError):
    """The MLflow server does not answer; worth another try."""


class TrackingRefused(PermissionError):
    """The MLflow server answers, but not to these credentials; waiting does not help."""


class TrackingUnset(ValueError):
    """`MLFLOW_TRACKING_URI` names no server; waiting does not help."""


@step
def check_services(store: str) -> None:
    """Write to and read from `store`, and ask the MLflow server how it is.

    Raises StorageUnreachable, StorageRefused, TrackingUnreachable, TrackingRefused or
    TrackingUnset, each naming the service, what it answered and what to start or set.
    """
    check_tracking()
    Store(store).check()


def check_tracking() -> None:
    """Ask the MLflow server of `MLFLOW_TRACKING_URI` for its health, as MLflow's client asks it."""
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
    # MLFLOW_TRACKING_USERNAME and their like; what the address carries is used without them.
    server = get_default_host_creds(address)  # type: ignore[no-untyped-call]
    once = {"timeout": _HEALTH_SECONDS, "max_retries": 0, "retry_codes": ()}
    try:
        answer = http_request(server, "/health", "GET", **once)  # type: ignore[no-untyped-call]
    except MlflowException as error:
        # The cause would be logged as it is, with what the address carries.
        raise _unreachable(shown, str(error)) from None
    if answer.status_code in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
        raise TrackingRefused(
            f"the MLflow server at {shown} refuses these credentials ({answer.status_code}); "
            "correct MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
            "MLFLOW_TRACKING_TOKEN, where this run executes"
        )
    if not answer.ok:
        raise _unreachable(shown, f"{answer.status_code} {answer.reason}")


def _unreachable(shown: str, reason: str) -> TrackingUnreachable:
    return TrackingUnreachable(
        f"the MLflow server does not answer at {shown.rstrip('/')}/health "
        f"({without_credentials(reason)}); start it (`make up` starts the local one) or correct "
        "MLFLOW_TRACKING_URI"
    )
