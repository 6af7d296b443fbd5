import base64
import threading
import traceback
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from tasks.preflight import check_services
from tasks.services.mlflow import (
    TrackingRefused,
    TrackingUnreachable,
    TrackingUnset,
    check_tracking,
)
from tasks.services.s3 import StorageUnreachable, Store

ALLOWED = {
    f"Basic {base64.b64encode(b'anna:s3cret').decode()}",
    "Bearer t0ken",
}


class Guarded(BaseHTTPRequestHandler):
    """Answer as an MLflow server behind a proxy that wants credentials."""

    def do_GET(self) -> None:
        allowed = self.headers.get("Authorization") in ALLOWED
        self.send_response(200 if allowed and self.path == "/health" else 401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there
        """Keep quiet."""


@pytest.fixture
def guarded() -> Iterator[str]:
    """Return the host and port of a server that lets anna in."""
    with HTTPServer(("127.0.0.1", 0), Guarded) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def test_services_that_answer_pass(store: Store) -> None:
    check_services.fn(store.address)


@pytest.mark.parametrize("address", ["", "sqlite:///mlflow.db"])
def test_an_mlflow_server_that_was_never_named_is_asked_for(
    address: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with pytest.raises(TrackingUnset, match="expected the http"):
        check_services.fn(store.address)


def test_an_mlflow_server_that_does_not_answer_is_named(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    with pytest.raises(TrackingUnreachable, match=r"127\.0\.0\.1:1/health.*`make up`"):
        check_services.fn(store.address)


def test_a_store_that_does_not_answer_is_named(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    with pytest.raises(StorageUnreachable, match=r"127\.0\.0\.1:1"):
        check_services.fn(store.address)


def test_credentials_in_the_address_are_used(guarded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://anna:s3cret@{guarded}/")
    check_tracking()


@pytest.mark.parametrize(
    "given",
    [
        {"MLFLOW_TRACKING_USERNAME": "anna", "MLFLOW_TRACKING_PASSWORD": "s3cret"},
        {"MLFLOW_TRACKING_TOKEN": "t0ken"},
    ],
    ids=["password", "token"],
)
def test_credentials_of_mlflows_own_variables_are_used(
    given: dict[str, str], guarded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{guarded}")
    with pytest.raises(TrackingRefused, match="refuses these credentials"):
        check_tracking()
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    check_tracking()


@pytest.mark.parametrize("address", ["http://anna:wr0ng@{}", "http://anna:wr0ng@127.0.0.1:1"])
def test_a_password_in_the_address_is_never_shown(
    address: str, guarded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in the sentence nor in what is logged with it."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address.format(guarded))
    with pytest.raises((TrackingRefused, TrackingUnreachable)) as told:
        check_tracking()
    assert address.format(guarded).partition("@")[2] in str(told.value)
    assert "wr0ng" not in "".join(traceback.format_exception(told.value))


def test_a_database_that_is_no_server_is_named_without_its_password(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://anna:s3cret@host/mlflow")
    with pytest.raises(TrackingUnset, match="'postgresql://host/mlflow'"):
        check_tracking()
