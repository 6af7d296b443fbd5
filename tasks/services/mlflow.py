"""The way to the MLflow server: its client, its errors as ours, and the addresses of its pages."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, TypeVar

from tasks.services.addresses import without_credentials

if TYPE_CHECKING:
    import mlflow.entities
    from mlflow import MlflowClient

    Run = mlflow.entities.Run

Found = TypeVar("Found")

_HEALTH_SECONDS = 10
_AWAY = {
    "INTERNAL_ERROR",  # MLflow's client uses it for failed connections, too
    "TEMPORARILY_UNAVAILABLE",
    "REQUEST_LIMIT_EXCEEDED",
    "RESOURCE_EXHAUSTED",
    "DEADLINE_EXCEEDED",
    "CANCELLED",
}
"""Codes of MLflow's errors that are transient, so that a retry may succeed."""


class RegistryError(RuntimeError):
    """The registry failed a read that a decision depends on, or refused a write."""


class RegistryUnreachable(RegistryError, ConnectionError):
    """The MLflow server does not respond, or is too busy; worth another try."""


class TrackingUnreachable(ConnectionError):
    """The MLflow server does not respond; worth another try."""


class TrackingRefused(PermissionError):
    """The MLflow server refuses these credentials; waiting does not help."""


class TrackingUnset(ValueError):
    """`MLFLOW_TRACKING_URI` names no server; waiting does not help."""


def client() -> "MlflowClient":
    """Return a client of the server of `MLFLOW_TRACKING_URI`; MLflow is imported only now."""
    from mlflow import MlflowClient

    return MlflowClient()


@contextmanager
def registry_errors(what: str) -> Iterator[None]:
    """Raise RegistryError in place of MLflow's errors; `what` is the subject of its message.

    It is a RegistryUnreachable if the server is away or busy. Works as a decorator, too.
    """
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except (MlflowException, RequestException, HTTPError) as error:
        address = os.environ["MLFLOW_TRACKING_URI"]
        sentence = without_credentials(
            f"{what} could not be read or written at {address} ({error})"
        )
        # Prefect logs the cause unchanged. Leave it out if the server's address holds a password.
        cause = error if without_credentials(address) == address else None
        if _is_away(error):
            raise RegistryUnreachable(
                f"{sentence}; nothing is promoted: repair the MLflow server and run again"
            ) from cause
        raise RegistryError(
            f"{sentence}; nothing is promoted: correct what MLflow refuses and run again"
        ) from cause


def _is_away(error: Exception) -> bool:
    """Return True for errors of MLflow's client, or of requests below it, that are transient."""
    code = getattr(error, "error_code", None)
    if code:
        return code in _AWAY
    response = getattr(error, "response", None)
    busy = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS}
    return (
        response is None
        or response.status_code in busy
        or response.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR
    )


def none_if_missing(read: Callable[[], Found]) -> Found | None:
    """Return what `read` returns; None only if MLflow responds that there is no such thing."""
    from mlflow.exceptions import MlflowException

    try:
        return read()
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def page(path: str) -> str:
    """Return the address of a page of MLflow's UI, for a browser."""
    import mlflow

    return f"{without_credentials(mlflow.get_tracking_uri()).rstrip('/')}/{path}"


def run_page(run_id: str) -> str:
    """Return the address of an MLflow run in MLflow's UI."""
    experiment = client().get_run(run_id).info.experiment_id
    return page(f"#/experiments/{experiment}/runs/{run_id}")


def check_tracking() -> None:
    """Request `/health` from the server of `MLFLOW_TRACKING_URI`, as MLflow's own client would.

    Raises TrackingUnreachable, TrackingRefused or TrackingUnset.
    """
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
    server = get_default_host_creds(address)
    # One attempt: the task has retries of its own, which wait longer.
    once = {"timeout": _HEALTH_SECONDS, "max_retries": 0, "retry_codes": ()}
    try:
        response = http_request(server, "/health", "GET", **once)
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
