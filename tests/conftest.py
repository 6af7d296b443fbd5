"""The real servers that integration tests speak to: one stack a session, on free ports."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from deployments.stack import PROJECT, Ports, Stack, environment, start, stop
from tasks.services.s3 import Store
from tests import server_logs
from tests.reaper import reaped

SERVERS = {"stack", "bench", "unused"}
"""The fixtures that start servers; every other server fixture asks for one of them."""


@pytest.hookimpl(tryfirst=True)  # before -m looks at the markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test that needs servers, however indirectly: nobody has to remember it."""
    for item in items:
        if isinstance(item, pytest.Function) and not SERVERS.isdisjoint(item.fixturenames):
            item.add_marker("servers")


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Prefect, MLflow, S3 and a worker that serves deployments/prefect.yaml.

    The session fails if one of them logged an error that server_logs.ALLOWED does not name.
    """
    stack = Stack(tmp_path_factory.mktemp("stack"), Ports.free())
    before = dict(os.environ)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a killed session ends its servers
    with reaped(stack.root):
        try:
            start(stack, deploy=PROJECT / "deployments" / "prefect.yaml")
            os.environ |= environment(stack) | {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
            with temporary_settings({PREFECT_API_URL: os.environ["PREFECT_API_URL"]}):
                yield stack
        finally:
            os.environ.clear()
            os.environ.update(before)
            stop(stack)
    unexpected = server_logs.errors(stack)
    assert not unexpected, "\n".join(["the servers logged errors:", *unexpected])


@pytest.fixture
def store(stack: Stack, request: pytest.FixtureRequest) -> Store:
    """Return an empty place in the stack's bucket."""
    return Store(f"s3://mnist-retraining/tests/{request.node.name}")


@pytest.fixture
def mnist_mirror(tmp_path: Path) -> Path:
    """Return a folder with copies of the four archives of MNIST_MIRROR, to be damaged at will."""
    address = os.environ.get("MNIST_MIRROR", "")
    if not address.startswith("file://"):
        pytest.skip("needs MNIST_MIRROR=file://FOLDER with the four MNIST archives")
    for archive in Path(address.removeprefix("file://")).glob("*.gz"):
        (tmp_path / archive.name).write_bytes(archive.read_bytes())
    return tmp_path
