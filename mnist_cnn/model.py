"""The CNN: from raw pixels to logits, so that a loaded model needs no preprocessing."""

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from mnist_cnn.digits import CLASSES


class GroupedBatchNorm(nn.BatchNorm2d):
    """Batch normalisation over groups of `group` images, independent of the size of the batch.

    A batch cut into micro-batches or divided among processes is therefore normalised as in one
    piece. Running statistics change only in `DigitCNN.calibrate`.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, momentum=0.0)
        self.group: int | None = None
        """Images that share statistics; None: the whole batch."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the base class's name
        """Normalise (N, C, H, W)."""
        if not self.training:
            return super().forward(input)
        parts = torch.split(input, self.group or len(input))  # (group, C, H, W) each
        done = [
            functional.batch_norm(
                part,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                training=True,
                momentum=self.momentum or 0.0,
                eps=self.eps,
            )
            for part in parts
        ]
        return done[0] if len(done) == 1 else torch.cat(done)


class DigitCNN(nn.Module):
    """A small convolutional network for 28 x 28 grey images.

    `forward` takes (N, 28, 28), 0 for background and 255 for ink, as uint8 or in the dtype of the
    convolutions, and returns float32 logits (N, 10).
    """

    def __init__(self, channels: tuple[int, int, int, int] = (16, 32, 64, 64)) -> None:
        super().__init__()
        first, second, third, fourth = channels
        self.features = nn.Sequential(
            nn.Conv2d(1, first, 5, stride=2, bias=False),  # (N, first, 12, 12)
            GroupedBatchNorm(first),
            nn.ReLU(inplace=True),
            nn.Conv2d(first, second, 3, bias=False),  # (N, second, 10, 10)
            nn.MaxPool2d(2),  # (N, second, 5, 5), before the normalisation: a quarter of its work
            GroupedBatchNorm(second),
            nn.ReLU(inplace=True),
            nn.Conv2d(second, third, 3, bias=False),  # (N, third, 3, 3)
            GroupedBatchNorm(third),
            nn.ReLU(inplace=True),
            nn.Conv2d(third, fourth, 3, bias=False),  # (N, fourth, 1, 1)
            GroupedBatchNorm(fourth),
            nn.ReLU(inplace=True),
        )
        self.classify = nn.Linear(fourth, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, 10) of images (N, 28, 28)."""
        # Neither centred nor scaled: the first normalisation would undo both, and every byte is
        # exact in bfloat16.
        pixels = images if images.is_floating_point() else images.float()
        pixels = pixels.unsqueeze(1).contiguous(memory_format=torch.channels_last)
        hidden = self.features(pixels)  # (N, 1, 28, 28) to (N, fourth, 1, 1)
        logits: Tensor = self.classify(hidden.flatten(1))  # (N, 10)
        return logits.float()

    def group_statistics(self, group: int) -> None:
        """Set the number of images that share batch normalisation's statistics in training."""
        for norm in self._norms():
            norm.group = group

    @torch.no_grad()
    def calibrate(self, images: Tensor) -> None:
        """Set the running statistics to those of `images` (N, 28, 28); switch to eval mode."""
        groups = [norm.group for norm in self._norms()]
        self.train()
        # With a momentum of 1, one pass over a single group replaces the statistics.
        for norm in self._norms():
            norm.momentum = 1.0
            norm.group = None
        self(images)
        for norm, group in zip(self._norms(), groups, strict=True):
            norm.momentum = 0.0
            norm.group = group
        self.eval()

    @torch.no_grad()
    def folded(self) -> "DigitCNN":
        """Return a copy for prediction with the normalisations folded into the convolutions.

        Its logits differ by rounding alone. A normalisation after max-pooling stays if it changes
        the sign of a channel: folded in before pooling, it would make the largest value the
        smallest.
        """
        model = deepcopy(self).eval()
        layers: list[nn.Module] = []
        for layer in model.features:
            if isinstance(layer, nn.BatchNorm2d):
                pools = isinstance(layers[-1], nn.MaxPool2d)
                conv = layers[-2] if pools else layers[-1]
                if isinstance(conv, nn.Conv2d) and (not pools or bool((layer.weight > 0).all())):
                    layers[-2 if pools else -1] = fuse_conv_bn_eval(conv, layer)
                    continue
            layers.append(layer)
        model.features = nn.Sequential(*layers)
        return model

    def _norms(self) -> list[GroupedBatchNorm]:
        return [module for module in self.modules() if isinstance(module, GroupedBatchNorm)]
