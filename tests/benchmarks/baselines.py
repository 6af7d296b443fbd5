"""Two peers' training recipes, rebuilt in our own words from their published descriptions.

`seed` is the system whose model card this project fills in: 206,922 parameters, Adam, 5 epochs,
PNG images decoded one at a time. `pytorch-example` is what PyTorch's own MNIST example does: two
convolutions, dropout, Adadelta, 14 epochs, transforms applied image by image. Both go through a
`DataLoader` in the main process, as theirs do on a CPU. Neither evaluates between epochs, and the
PNG files lie in memory and not on a disk: where the description leaves a choice, the peer gets the
faster one.
"""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from mnist_cnn.digits import Digits

Item = tuple[Tensor, int]


class ImageByImage(Dataset[Item]):
    """Digits that are each made an image and normalised when they are asked for.

    `png` keeps them as PNG files in memory, to be decoded; else they are arrays.
    """

    def __init__(self, digits: Digits, *, png: bool) -> None:
        self.images = [_encode(image) for image in digits.images] if png else digits.images
        self.labels = digits.labels.tolist()
        self.transform = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Item:
        stored = self.images[index]
        image = (
            Image.open(io.BytesIO(stored)) if isinstance(stored, bytes) else Image.fromarray(stored)
        )
        return self.transform(image), self.labels[index]


def _encode(image: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def seed_network() -> nn.Module:
    """Return the card's network: two padded convolutions, two linear layers."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 7 * 7, 128), nn.ReLU(), nn.Linear(128, 10)),
    )


def example_network() -> nn.Module:
    """Return the example's network: two unpadded convolutions, dropout, two linear layers."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Dropout(0.25), nn.Flatten()),
        *(nn.Linear(64 * 12 * 12, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10)),
    )


@dataclass(frozen=True)
class Recipe:
    """How one peer trains."""

    network: Callable[[], nn.Module]
    png: bool
    """Whether images are decoded from PNG one by one, or come from an array."""
    optimizer: Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]
    parameters: int
    """Trainable parameters, as published."""
    epochs: int
    """Passes over the training images, as published."""
    decay: float
    """The learning rate is multiplied by this after each epoch."""
    share: float
    """Share of the training split that is trained on."""
    batch_size: int = 64


RECIPES = {
    "seed": Recipe(
        network=seed_network,
        png=True,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
        parameters=206_922,
        epochs=5,
        decay=1.0,
        share=0.7,
    ),
    "pytorch-example": Recipe(
        network=example_network,
        png=False,
        optimizer=lambda parameters: torch.optim.Adadelta(parameters, lr=1.0),
        parameters=1_199_882,
        epochs=14,
        decay=0.7,
        share=1.0,
    ),
}


def fit(
    recipe: Recipe, dataset: Dataset[Item], *, epochs: int, seed: int, device: torch.device
) -> nn.Module:
    """Train the recipe's network and return it in eval mode.

    `epochs` may be fewer than the recipe's own: the first ones of its schedule.
    """
    torch.manual_seed(seed)
    model = recipe.network().to(device)
    optimizer = recipe.optimizer(model.parameters())
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, recipe.decay)
    criterion = nn.CrossEntropyLoss()
    batches = DataLoader(dataset, batch_size=recipe.batch_size, shuffle=True)
    for _ in range(epochs):
        for images, labels in batches:
            optimizer.zero_grad()
            criterion(model(images.to(device)), labels.to(device)).backward()
            optimizer.step()
        schedule.step()
    return model.eval()


def part(digits: Digits, share: float, seed: int) -> Digits:
    """Return a random share of the digits."""
    chosen = np.random.default_rng(seed).permutation(len(digits))[: int(share * len(digits))]
    return Digits(digits.images[chosen], digits.labels[chosen])


@torch.inference_mode()
def accuracy(model: nn.Module, digits: Digits, device: torch.device) -> float:
    """Return the share of digits that a peer's model classifies rightly."""
    right = 0
    for start in range(0, len(digits), 1000):
        pixels = torch.tensor(digits.images[start : start + 1000]).to(device)
        scaled = (pixels.unsqueeze(1) / 255 - 0.1307) / 0.3081
        labels = torch.tensor(digits.labels[start : start + 1000]).to(device)
        right += int((model(scaled).argmax(1) == labels).sum())
    return right / len(digits)
