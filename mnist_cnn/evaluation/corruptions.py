"""Corruptions of images and their strengths, each defined once.

The same seed gives the same images to every model, in every run and on every machine with the same
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
"""Images in a batch. Part of the definition, because the noise is drawn by batch; 500 is also the
size at which the CNN runs fastest on a CPU (its activations stay in the cache)."""

_MNIST_C = "Mu and Gilmer 2019, MNIST-C, arXiv:1906.02337"
_IMAGENET_C = "Hendrycks and Dietterich 2019, arXiv:1903.12261, severities 1, 3 and 5"
_MORPHO = "Castro et al. 2019, Morpho-MNIST, arXiv:1809.10780"


@dataclass(frozen=True)
class Corruption:
    """One way to corrupt an image, and the strengths to measure.

    Strengths start with the mildest; those of slant, rotation and scale ascend, with the mild ones
    in the middle. `apply` takes float32 (N, 28, 28), 0 for background and 1 for ink, a strength in
    `unit` and a generator of noise, and returns the same shape; `corrupted` rounds and clips it
    back to uint8.
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
    for number, batch in enumerate(torch.split(images, BATCH)):  # (500, 28, 28) or fewer
        # Each batch has its own seed, so its noise does not depend on the batches before it. CRC-32
        # maps a text to the same number in every process, unlike `hash`.
        key = f"{seed}/{condition(corruption, strength)}/{number}"
        noise = Generator().manual_seed(zlib.crc32(key.encode()))
        pixels = corruption.apply(batch.float() / 255, strength, noise)
        yield (pixels * 255).round_().clamp_(0, 255).to(torch.uint8)


def _affine(images: Tensor, angle: float = 0, scale: float = 1, shear: float = 0) -> Tensor:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2.functional import affine

    # torchvision expects a channel: (N, 1, 28, 28). Pixels beyond the frame are background (0).
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
    wide = functional.pad(images, (1, 1, 1, 1))  # (N, 30, 30)
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
    # Grey-scale erosion, one pixel a turn; the last turn blends in the remaining fraction of one.
    while pixels > 0:
        images = images.lerp(_neighbours(images).amin(0), min(pixels, 1))
        pixels -= 1
    return images


def _thicken(images: Tensor, pixels: float, _: Generator) -> Tensor:
    # Grey-scale dilation, with turns as in `_thin`.
    while pixels > 0:
        images = images.lerp(_neighbours(images).amax(0), min(pixels, 1))
        pixels -= 1
    return images


def _bell(sigma: float) -> Tensor:
    """Return the 28 x 28 matrix that weighs pixel j for pixel i by a Gaussian of their distance.

    Two products with it blur a batch in both directions, some 30 times faster on a CPU than the
    two-dimensional convolution of torchvision's `gaussian_blur`.
    """
    pixel = torch.arange(SIDE, dtype=torch.float32)  # (28,)
    return torch.exp(-((pixel[:, None] - pixel) ** 2) / (2 * sigma**2))  # (28, 28)


def _elastic(images: Tensor, pixels: float, noise: Generator) -> Tensor:
    # Every pixel is displaced by smoothed white noise, so that neighbours move together. Rows of
    # norm 1 keep the noise's variance at 1 after smoothing, at the edges as well.
    bell = _bell(4.0)
    bell /= bell.norm(dim=1, keepdim=True)  # (28, 28)
    white = torch.randn(len(images), 2, SIDE, SIDE, generator=noise)  # (N, 2, 28, 28)
    smooth = bell @ white @ bell.T  # (N, 2, 28, 28), variance 1
    # `grid_sample` measures from -1 to 1 across the image, so a pixel is 2 / 28 in its units.
    shift = smooth.permute(0, 2, 3, 1) * (pixels * 2 / SIDE)  # (N, 28, 28, 2)
    identity = torch.eye(2, 3)[None]  # (1, 2, 3)
    here = functional.affine_grid(identity, [1, 1, SIDE, SIDE], align_corners=False)
    grid = (here + shift).to(images.device)  # (N, 28, 28, 2)
    return functional.grid_sample(images[:, None], grid, align_corners=False)[:, 0]


def _add_gaussian(images: Tensor, deviation: float, noise: Generator) -> Tensor:
    white = torch.randn(images.shape, generator=noise).to(images.device)
    return images + deviation * white


def _add_impulses(images: Tensor, share: float, noise: Generator) -> Tensor:
    # One draw a pixel: the lowest values become background, the highest ink, half of `share` each.
    draw = torch.rand(images.shape, generator=noise).to(images.device)  # (N, 28, 28)
    return images.masked_fill(draw < share / 2, 0).masked_fill(draw > 1 - share / 2, 1)


def _add_shot_noise(images: Tensor, photons: float, noise: Generator) -> Tensor:
    # The generator is on the CPU, and `poisson` draws on the device of its input.
    counted = torch.poisson(images.cpu() * photons, generator=noise)
    return counted.to(images.device) / photons


def _blur(images: Tensor, sigma: float, _: Generator) -> Tensor:
    # One divisor for all rows, the largest sum. Near an edge the weights then sum to less than 1,
    # as if there were background beyond the frame.
    bell = _bell(sigma)
    bell = (bell / bell.sum(1).max()).to(images.device)  # (28, 28)
    return bell @ images @ bell.T


def _lower_resolution(images: Tensor, side: float, _: Generator) -> Tensor:
    from torchvision.transforms.v2.functional import resize

    small = resize(images[:, None], [int(side)] * 2, antialias=True)  # (N, 1, side, side)
    large: Tensor = resize(small, [SIDE, SIDE], antialias=True)  # (N, 1, 28, 28)
    return large[:, 0]


def _lower_contrast(images: Tensor, factor: float, _: Generator) -> Tensor:
    from torchvision.transforms.v2.functional import adjust_contrast

    flat: Tensor = adjust_contrast(images[:, None], factor)
    return flat[:, 0]


def _brighten(images: Tensor, offset: float, _: Generator) -> Tensor:
    return images + offset


def _occlude(images: Tensor, side: float, noise: Generator) -> Tensor:
    # MNIST's digits lie in the middle 20 x 20 pixels; the patch's middle does too.
    middle = torch.rand(len(images), 2, generator=noise) * 20 + 4  # (N, 2): row, column
    pixel = torch.arange(SIDE) + 0.5  # (28,), the centre of each
    rows = (pixel - middle[:, :1]).abs() < side / 2  # (N, 28)
    columns = (pixel - middle[:, 1:]).abs() < side / 2  # (N, 28)
    patch = rows[:, :, None] & columns[:, None, :]  # (N, 28, 28)
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
