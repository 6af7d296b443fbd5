from collections.abc import Iterator

import pytest
import torch
from mlflow import MlflowClient

from deployments.stack import Stack


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other make small tensors slow wherever cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def _no_champion_yet(stack: Stack) -> None:
    """A champion of another module would be made of the same, and its runs skipped."""
    for model in MlflowClient().search_registered_models():
        MlflowClient().delete_registered_model(model.name)
