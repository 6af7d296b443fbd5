"""The CNN: raw pixels in, logits out, so that whoever loads it needs no preprocessing."""

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from mnist_cnn.digits import CLASSES


class GroupedBatchNorm(nn.BatchNorm2d):
    """Batch normalisation whose statistics are those of `group` images, however many arrive.

    A batch that is cut into micro-batches or shared among processes is therefore normalised just as
    it is in one piece. Running statistics stay as they are until `DigitCNN.calibrate`.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, momentum=0.0)
        self.group: int | None = None
        """Images that share statistics; None: all that arrive."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the base class names it so
        """Normalise (N, C, H, W)."""
        if not self.training:
            return super().forward(input)
        parts = torch.split(input, self.group or len(input))
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
    """A small convolutional network over 28 x 28 grey images.

    `forward` takes (N, 28, 28), 0 for background and 255 for ink, as uint8 or in the dtype of the
    convolutions, and returns float32 logits (N, 10).
    """

    def __init__(self, channels: tuple[int, int, int, int] = (16, 32, 64, 64)) -> None:
        super().__init__()
        first, second, third, fourth = channels
        self.features = nn.Sequential(
            nn.Conv2d(1, first, 5, stride=2, bias=False),
            GroupedBatchNorm(first),
            nn.ReLU(inplace=True),
            nn.Conv2d(first, second, 3, bias=False),
            nn.MaxPool2d(2),
            GroupedBatchNorm(second),
            nn.ReLU(inplace=True),
            nn.Conv2d(second, third, 3, bias=False),
            GroupedBatchNorm(third),
            nn.ReLU(inplace=True),
            nn.Conv2d(third, fourth, 3, bias=False),
            GroupedBatchNorm(fourth),
            nn.ReLU(inplace=True),
        )
        self.classify = nn.Linear(fourth, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits of uint8 images."""
        # Neither centred nor scaled: the first normalisation undoes both, and a byte is exact in
        # bfloat16 as it stands.
        pixels = (images if images.is_floating_point() else images.float()).unsqueeze(1)
        hidden = self.features(pixels.contiguous(memory_format=torch.channels_last))
        logits: Tensor = self.classify(hidden.flatten(1))
        return logits.float()

    def group_statistics(self, group: int) -> None:
        """Let batch normalisation in training take its statistics over `group` images."""
        for norm in self._norms():
            norm.group = group

    @torch.no_grad()
    def calibrate(self, images: Tensor) -> None:
        """Set the running statistics to those of these images, and the model to eval mode."""
        groups = [norm.group for norm in self._norms()]
        self.train()
        for norm in self._norms():
            norm.momentum, norm.group = 1.0, None
        self(images)
        for norm, group in zip(self._norms(), groups, strict=True):
            norm.momentum, norm.group = 0.0, group
        self.eval()

    @torch.no_grad()
    def folded(self) -> "DigitCNN":
        """Return a copy for prediction, the normalisations being folded into the convolutions.

        Its logits differ by rounding alone. A normalisation that follows max-pooling stays if it
        turns a channel's sign, because the largest value would then become the smallest.
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
