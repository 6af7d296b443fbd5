"""Two peers' training recipes, rebuilt in our own words from what they publish.

`original` is the system whose model card this project fills in
(https://github.com/mlops-2425q1-mds-upc/MLOps-mdsist): all 70,000 images are merged and split
afresh (70 % to train, 15 % to validate after each epoch, 15 % to test), lie as PNG files in a data
frame, and are looked up and decoded one at a time; 206,922 parameters, Adam, 5 epochs, four scores
over both parts after each. `pytorch-example` is what PyTorch's own MNIST example does
(https://github.com/pytorch/examples/tree/main/mnist): two convolutions, dropout, Adadelta, 14
epochs, transforms applied image by image, the test split after each epoch. Both go through a
`DataLoader` in the main process, as theirs do on a CPU. The file is read, and whatever they track
or log is left out.
"""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from mnist_cnn.digits import Digits

Item = tuple[Tensor, int]


class ImageByImage(Dataset[Item]):
    """Digits that are each looked up, made an image and normalised when they are asked for.

    `png` keeps them as PNG files in a data frame, to be decoded; else they are arrays.
    """

    def __init__(self, digits: Digits, mean: float, deviation: float, *, png: bool) -> None:
        self.images: pd.DataFrame | NDArray[np.uint8] = digits.images
        if png:
            files = [{"bytes": _encode(image)} for image in digits.images]
            self.images = pd.DataFrame({"image": files, "label": digits.labels})
        self.labels = digits.labels.tolist()
        self.transform = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize((mean,), (deviation,))]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Item:
        if isinstance(self.images, pd.DataFrame):
            file: Any = self.images.loc[index, "image"]
            label: Any = self.images.loc[index, "label"]
            return self.transform(Image.open(io.BytesIO(file["bytes"]))), int(label)
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


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
    mean: float
    deviation: float
    """What pixels between 0 and 1 are normalised with."""
    shares: tuple[float, float] | None = None
    """What is trained on and what is validated on, of everything; None: the published split."""
    batch_size: int = 64

    def split(self, train: Digits, test: Digits, seed: int) -> tuple[Digits, Digits, Digits]:
        """Return what is trained on, what is looked at after each epoch, and the test part."""
        if self.shares is None:
            return train, test, test
        images = np.concatenate([train.images, test.images])
        labels = np.concatenate([train.labels, test.labels])
        order = np.random.default_rng(seed).permutation(len(labels))
        ends = [round(sum(self.shares[:n]) * len(labels)) for n in (1, 2)]
        parts = [Digits(images[part], labels[part]) for part in np.split(order, ends)]
        return parts[0], parts[1], parts[2]

    def dataset(self, digits: Digits) -> ImageByImage:
        """Return the digits as this peer reads them."""
        return ImageByImage(digits, self.mean, self.deviation, png=self.png)


RECIPES = {
    "original": Recipe(
        network=seed_network,
        png=True,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
        parameters=206_922,
        epochs=5,
        decay=1.0,
        mean=0.5,
        deviation=0.5,
        shares=(0.7, 0.15),
    ),
    "pytorch-example": Recipe(
        network=example_network,
        png=False,
        optimizer=lambda parameters: torch.optim.Adadelta(parameters, lr=1.0),
        parameters=1_199_882,
        epochs=14,
        decay=0.7,
        mean=0.1307,
        deviation=0.3081,
    ),
}


def fit(
    recipe: Recipe,
    train: Dataset[Item],
    held: Dataset[Item],
    *,
    epochs: int,
    seed: int,
    device: torch.device,
) -> nn.Module:
    """Train the recipe's network, look at `held` after each epoch; return it in eval mode.

    `epochs` may be fewer than the recipe's own: the first ones of its schedule.
    """
    torch.manual_seed(seed)
    model = recipe.network().to(device)
    optimizer = recipe.optimizer(model.parameters())
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, recipe.decay)
    for _ in range(epochs):
        answers = _pass(model.train(), train, recipe, device, optimizer)
        with torch.no_grad():
            seen = _pass(model.eval(), held, recipe, device)
        if recipe.shares is not None:
            _scores(*answers)
            _scores(*seen)
        schedule.step()
    return model.eval()


def _pass(
    model: nn.Module,
    dataset: Dataset[Item],
    recipe: Recipe,
    device: torch.device,
    optimizer: torch.optim.Optimizer | None = None,
) -> tuple[list[int], list[int]]:
    """Show the data set once, to learn from with an optimizer; return labels and answers."""
    criterion, loss = nn.CrossEntropyLoss(), 0.0
    right: list[int] = []
    answers: list[int] = []
    batches = DataLoader(dataset, batch_size=recipe.batch_size, shuffle=optimizer is not None)
    for images, labels in batches:
        if optimizer:
            optimizer.zero_grad()
        logits = model(images.to(device))
        part = criterion(logits, labels.to(device))
        if optimizer:
            part.backward()
            optimizer.step()
        loss += part.item()
        right += labels.tolist()
        answers += logits.argmax(1).tolist()
    return right, answers


def _scores(right: list[int], answers: list[int]) -> list[float]:
    macro = (precision_score, recall_score, f1_score)
    scores = [score(right, answers, average="macro", zero_division=0) for score in macro]
    return [accuracy_score(right, answers), *scores]


@torch.inference_mode()
def accuracy(model: nn.Module, digits: Digits, recipe: Recipe, device: torch.device) -> float:
    """Return the share of digits that a peer's model classifies rightly."""
    right = 0
    for start in range(0, len(digits), 1000):
        pixels = torch.tensor(digits.images[start : start + 1000]).to(device)
        scaled = (pixels.unsqueeze(1) / 255 - recipe.mean) / recipe.deviation
        labels = torch.tensor(digits.labels[start : start + 1000]).to(device)
        right += int((model(scaled).argmax(1) == labels).sum())
    return right / len(digits)
