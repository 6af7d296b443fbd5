import os
from urllib.request import urlopen

import pytest

from mnist_cnn.digits import Digits
from mnist_cnn.idx import digits_from_idx
from mnist_cnn.sample import embedded_sample

Splits = tuple[Digits, Digits]


@pytest.fixture(scope="session")
def sample() -> Splits:
    return embedded_sample()


@pytest.fixture(scope="session")
def mnist() -> Splits:
    mirror = os.environ.get("MNIST_MIRROR")
    if not mirror:
        pytest.skip("MNIST_MIRROR is not set: the same facts are tested on the embedded sample")

    def fetched(name: str) -> bytes:
        with urlopen(f"{mirror.rstrip('/')}/{name}-ubyte.gz") as answer:  # noqa: S310 - the tester's own address
            content: bytes = answer.read()
        return content

    def read(split: str) -> Digits:
        images, labels = fetched(f"{split}-images-idx3"), fetched(f"{split}-labels-idx1")
        return digits_from_idx(images, labels, split)

    return read("train"), read("t10k")


@pytest.fixture(scope="session", params=["sample", "mnist"])
def honest(request: pytest.FixtureRequest) -> Splits:
    """Each honest data set that can be had."""
    splits: Splits = request.getfixturevalue(request.param)
    return splits
