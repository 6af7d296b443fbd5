"""Cost of a model: its size, its multiply-accumulates and its speed."""

import time

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mnist_cnn.digits import SIDE
from mnist_cnn.evaluation.corruptions import BATCH
from mnist_cnn.evaluation.figures import ModelSize, Times

_WARM_UP = 3
"""First runs, left out because they pay for set-up that later ones find done."""


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's parameters; without any parameter, the CPU."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def measure_size(model: nn.Module, file_bytes: int | None = None) -> ModelSize:
    """Count parameters, and multiply-accumulates of one image; `file_bytes` is passed through."""
    from torch.utils.flop_counter import FlopCounterMode

    image = torch.zeros(1, SIDE, SIDE, dtype=torch.uint8, device=device_of(model))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    # The counter counts a multiplication and an addition as two operations.
    return ModelSize(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        multiply_accumulates=counter.get_total_flops() // 2,
        file_bytes=file_bytes,
    )


def measure_times(
    model: nn.Module, images: NDArray[np.uint8], scoring_seconds: float, repeats: int = 100
) -> Times:
    """Time one image and one batch of uint8 (N, 28, 28), after a warm-up.

    `scoring_seconds` is passed through.
    """
    device = device_of(model)
    image = torch.from_numpy(images[:1].copy()).to(device)  # (1, 28, 28)
    single = _durations(model, image, repeats)
    batch = torch.from_numpy(images[:BATCH].copy()).to(device)  # (500, 28, 28) or fewer
    together = _durations(model, batch, max(5, repeats // 10))
    return Times(
        device=str(device),
        threads=torch.get_num_threads(),
        single_image_ms=float(np.median(single)) * 1000,
        single_image_p95_ms=float(np.quantile(single, 0.95)) * 1000,
        batch_size=len(batch),
        batch_images_per_second=len(batch) / float(np.median(together)),
        scoring_seconds=scoring_seconds,
    )


def _durations(model: nn.Module, images: torch.Tensor, repeats: int) -> list[float]:
    """Return the seconds of each of `repeats` runs, after `_WARM_UP` that do not count."""
    seconds = []
    with torch.inference_mode():
        for _ in range(_WARM_UP + repeats):
            start = time.perf_counter()
            model(images).argmax(1).cpu()  # the copy waits for the device
            seconds.append(time.perf_counter() - start)
    return seconds[_WARM_UP:]
