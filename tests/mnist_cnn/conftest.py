from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from mnist_cnn.digits import CLASSES, Digits
from mnist_cnn.evaluation import Outcomes, measure_all
from mnist_cnn.sample import embedded_sample


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other make small tensors slow wherever cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class NearestMean(nn.Module):
    """Reads a digit by its distance from the mean of each class: trained at once, never random."""

    def __init__(self, training: Digits, sharpness: float) -> None:
        super().__init__()
        images, labels = torch.tensor(training.images) / 255, torch.tensor(training.labels)
        means = torch.stack([images[labels == digit].mean(0) for digit in range(CLASSES)])
        self.means = nn.Parameter(means.flatten(1))
        self.sharpness = sharpness

    def forward(self, images: Tensor) -> Tensor:
        return -torch.cdist(images.flatten(1) / 255, self.means) * self.sharpness


@pytest.fixture(scope="session")
def splits() -> tuple[Digits, Digits]:
    return embedded_sample()


@pytest.fixture(scope="session")
def reader(splits: tuple[Digits, Digits]) -> nn.Module:
    return NearestMean(splits[0], 3.0)


@pytest.fixture(scope="session")
def outcomes(splits: tuple[Digits, Digits], reader: nn.Module) -> dict[str, Outcomes]:
    """Return what two models say: the second was trained on half of the images."""
    half = Digits(splits[0].images[::2], splits[0].labels[::2])
    return measure_all({"candidate": reader, "champion": NearestMean(half, 1.0)}, splits[1])
