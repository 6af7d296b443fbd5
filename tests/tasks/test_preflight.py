import pytest

from tasks.preflight import TrackingUnreachable, TrackingUnset, check_services
from tasks.services.s3 import StorageUnreachable, Store


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
