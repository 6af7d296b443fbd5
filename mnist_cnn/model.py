"""The CNN: raw pixels in, logits out, so that whoever loads it needs no preprocessing."""

import torch
from torch import Tensor, nn

from mnist_cnn.digits import CLASSES

# Mean and standard deviation of the pixels of MNIST's training split, divided by 255.
_MEAN, _STD = 0.1307, 0.3081


class DigitCNN(nn.Module):
    """A small convolutional network over 28 x 28 grey images.

    `forward` takes uint8 (N, 28, 28), 0 for background and 255 for ink, and returns float32 logits
    (N, 10).
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, bias=False),
            nn.MaxPool2d(2),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
        )
        self.classify = nn.Linear(64 * 2 * 2, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        pixels = (images.unsqueeze(1).float() - 255 * _MEAN) / (255 * _STD)
        hidden = self.features(pixels.contiguous(memory_format=torch.channels_last))
        logits: Tensor = self.classify(hidden.flatten(1))
        return logits.float()
