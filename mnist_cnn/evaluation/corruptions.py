"""What can happen to an image: every corruption and its strengths, defined once.

The same seed gives the same images to every model, at every run and on every machine with the same
version of torch: noise is always drawn on the CPU, in batches of one size.
"""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional

from mnist_cnn.digits import SIDE
from mnist_cnn.evaluation.figures import Factor

BATCH = 500
"""Images a batch. Part of the definition, because the noise is drawn by batch; 500 is also where
the CNN runs fastest on a CPU (its activations stay in the cache)."""

_MNIST_C = "Mu and Gilmer 2019, MNIST-C, arXiv:1906.02337"
_IMAGENET_C = "Hendrycks and Dietterich 2019, arXiv:1903.12261, severities 1, 3 and 5"
_MORPHO = "Castro et al. 2019, Morpho-MNIST, arXiv:1809.10780"


@dataclass(frozen=True)
class Corruption:
    """One way to spoil an image, mildest strength first on each side of zero.

    `apply` takes float32 (N, 28, 28), 0 for background and 1 for ink, a strength in `unit` and a
    source of noise, and returns the same shape; `corrupted` clips and rounds it back to uint8.
    """

    name: str
    factor: Factor
    unit: str
    strengths: tuple[float, ...]
    source: str
    apply: Callable[[Tensor, float, Generator], Tensor]


def condition(corruption: Corruption, strength: float) -> str:
    """Return the name of a corruption at a strength, such as `slant=-15`."""
    return f"{corruption.name}={strength:g}"


def corrupted(
    images: Tensor, corruption: Corruption, strength: float, seed: int = 0
) -> Iterator[Tensor]:
    """Yield `images`, uint8 (N, 28, 28), corrupted, in order and in batches of `BATCH`."""
    for number, batch in enumerate(torch.split(images, BATCH)):
        key = f"{seed}/{condition(corruption, strength)}/{number}"
        noise = Generator().manual_seed(zlib.crc32(key.encode()))
        spoiled = corruption.apply(batch.float() / 255, strength, noise)
        yield (spoiled * 255).round_().clamp_(0, 255).to(torch.uint8)


def _affine(images: Tensor, angle: float = 0, scale: float = 1, shear: float = 0) -> Tensor:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2.functional import affine

    moved: Tensor = affine(
        images[:, None], angle, [0, 0], scale, [shear, 0], InterpolationMode.BILINEAR
    )
    return moved[:, 0]


def _slant(images: Tensor, degrees: float, _: Generator) -> Tensor:
    return _affine(images, shear=degrees)


def _rotate(images: Tensor, degrees: float, _: Generator) -> Tensor:
    return _affine(images, angle=degrees)


def _scale(images: Tensor, factor: float, _: Generator) -> Tensor:
    return _affine(images, scale=factor)


def _neighbours(images: Tensor) -> Tensor:
    """Return every pixel and its four neighbours: (5, N, 28, 28)."""
    wide = functional.pad(images, (1, 1, 1, 1))
    inner = slice(1, -1)
    return torch.stack(
        [
            images,
            wide[:, :-2, inner],
            wide[:, 2:, inner],
            wide[:, inner, :-2],
            wide[:, inner, 2:],
        ]
    )


def _thin(images: Tensor, pixels: float, _: Generator) -> Tensor:
    while pixels > 0:
        images = images.lerp(_neighbours(images).amin(0), min(pixels, 1))
        pixels -= 1
    return images


def _thicken(images: Tensor, pixels: float, _: Generator) -> Tensor:
    while pixels > 0:
        images = images.lerp(_neighbours(images).amax(0), min(pixels, 1))
        pixels -= 1
    return images


def _bell(sigma: float) -> Tensor:
    """Return the 28 x 28 matrix that weighs pixel j for pixel i by a Gaussian of their distance.

    Two products with it blur a batch in both directions, some 30 times faster on a CPU than the
    two-dimensional convolution of torchvision's `gaussian_blur`.
    """
    place = torch.arange(SIDE, dtype=torch.float32)
    return torch.exp(-((place[:, None] - place) ** 2) / (2 * sigma**2))


def _elastic(images: Tensor, pixels: float, noise: Generator) -> Tensor:
    bell = _bell(4.0)
    bell /= bell.norm(dim=1, keepdim=True)  # white noise of variance 1 stays so at every pixel
    white = torch.randn(len(images), 2, SIDE, SIDE, generator=noise)
    shift = (bell @ white @ bell.T).permute(0, 2, 3, 1) * (pixels * 2 / SIDE)
    here = functional.affine_grid(torch.eye(2, 3)[None], [1, 1, SIDE, SIDE], align_corners=False)
    grid = (here + shift).to(images.device)
    return functional.grid_sample(images[:, None], grid, align_corners=False)[:, 0]


def _add_gaussian(images: Tensor, deviation: float, noise: Generator) -> Tensor:
    white = torch.randn(images.shape, generator=noise).to(images.device)
    return images + deviation * white


def _add_impulses(images: Tensor, share: float, noise: Generator) -> Tensor:
    dice = torch.rand(images.shape, generator=noise).to(images.device)
    return images.masked_fill(dice < share / 2, 0).masked_fill(dice > 1 - share / 2, 1)


def _add_shot_noise(images: Tensor, photons: float, noise: Generator) -> Tensor:
    counted = torch.poisson(images.cpu() * photons, generator=noise)
    return counted.to(images.device) / photons


def _blur(images: Tensor, sigma: float, _: Generator) -> Tensor:
    bell = _bell(sigma)
    bell = (bell / bell.sum(1).max()).to(images.device)
    return bell @ images @ bell.T


def _lower_resolution(images: Tensor, side: float, _: Generator) -> Tensor:
    from torchvision.transforms.v2.functional import resize

    small = resize(images[:, None], [int(side)] * 2, antialias=True)
    large: Tensor = resize(small, [SIDE, SIDE], antialias=True)
    return large[:, 0]


def _lower_contrast(images: Tensor, factor: float, _: Generator) -> Tensor:
    from torchvision.transforms.v2.functional import (
        adjust_contrast,
    )

    flat: Tensor = adjust_contrast(images[:, None], factor)
    return flat[:, 0]


def _brighten(images: Tensor, offset: float, _: Generator) -> Tensor:
    return images + offset


def _occlude(images: Tensor, side: float, noise: Generator) -> Tensor:
    # MNIST's digits lie in the middle 20 x 20 pixels; the patch's middle does too.
    middle = torch.rand(len(images), 2, generator=noise) * 20 + 4
    pixel = torch.arange(SIDE) + 0.5
    rows = (pixel - middle[:, :1]).abs() < side / 2
    columns = (pixel - middle[:, 1:]).abs() < side / 2
    patch = rows[:, :, None] & columns[:, None, :]
    return images.masked_fill(patch.to(images.device), 0)


CORRUPTIONS = (
    Corruption(
        "slant", "handwriting style", "degrees to the right", (-30, -15, 15, 30), _MNIST_C, _slant
    ),
    Corruption(
        "rotation",
        "handwriting style",
        "degrees clockwise",
        (-30, -15, 15, 30),
        _MNIST_C,
        _rotate,
    ),
    Corruption(
        "scale", "handwriting style", "times the size", (0.5, 0.7, 1.2, 1.4), _MNIST_C, _scale
    ),
    Corruption(
        "thin stroke",
        "handwriting style",
        "px taken from each edge",
        (0.25, 0.5, 0.75),
        _MORPHO,
        _thin,
    ),
    Corruption(
        "thick stroke",
        "handwriting style",
        "px added to each edge",
        (0.5, 1, 2),
        _MORPHO,
        _thicken,
    ),
    Corruption(
        "elastic style",
        "handwriting style",
        "px of displacement, root mean square",
        (0.5, 1, 1.5),
        "Simard et al. 2003, doi:10.1109/ICDAR.2003.1227801, smoothed over 4 px",
        _elastic,
    ),
    Corruption(
        "Gaussian noise",
        "noise level",
        "SD, share of full ink",
        (0.08, 0.18, 0.38),
        _IMAGENET_C,
        _add_gaussian,
    ),
    Corruption(
        "impulse noise",
        "noise level",
        "share of pixels black or white",
        (0.03, 0.09, 0.27),
        _IMAGENET_C,
        _add_impulses,
    ),
    Corruption(
        "shot noise",
        "noise level",
        "photons at full ink",
        (60, 12, 3),
        _IMAGENET_C,
        _add_shot_noise,
    ),
    Corruption(
        "blur",
        "image quality",
        "px of standard deviation",
        (1, 1.5, 2),
        "Gaussian blur of Hendrycks and Dietterich 2019, arXiv:1903.12261, graded for 28 px",
        _blur,
    ),
    Corruption(
        "low resolution",
        "image quality",
        "px a side, before enlarging to 28",
        (14, 10, 7),
        "Pixelation of Hendrycks and Dietterich 2019, arXiv:1903.12261, graded for 28 px",
        _lower_resolution,
    ),
    Corruption(
        "low contrast",
        "image quality",
        "times the contrast",
        (0.4, 0.2, 0.05),
        _IMAGENET_C,
        _lower_contrast,
    ),
    Corruption(
        "brightness",
        "image quality",
        "added to every pixel, share of full ink",
        (0.1, 0.3, 0.5),
        _IMAGENET_C,
        _brighten,
    ),
    Corruption(
        "occlusion",
        "image quality",
        "px a side of a hidden square",
        (4, 8, 12),
        "Zhong et al. 2017, Random Erasing, arXiv:1708.04896",
        _occlude,
    ),
)
"""Every corruption that a model is measured under, by factor."""
