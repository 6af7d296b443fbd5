"""What a model costs: its size, its multiply-accumulates and its speed."""

import time

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mnist_cnn.digits import SIDE
from mnist_cnn.evaluation.corruptions import BATCH
from mnist_cnn.evaluation.figures import ModelSize, Times


def device_of(model: nn.Module) -> torch.device:
    """Return where the model's parameters are; a model without any runs on the CPU."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def measure_size(model: nn.Module, file_bytes: int | None = None) -> ModelSize:
    """Count parameters and multiply-accumulates; `file_bytes` is carried along."""
    from torch.utils.flop_counter import FlopCounterMode

    image = torch.zeros(1, SIDE, SIDE, dtype=torch.uint8, device=device_of(model))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    return ModelSize(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        multiply_accumulates=counter.get_total_flops() // 2,
        file_bytes=file_bytes,
    )


def measure_times(
    model: nn.Module, images: NDArray[np.uint8], scoring_seconds: float, repeats: int = 100
) -> Times:
    """Time one image and one batch of uint8 (N, 28, 28), after a warm-up."""
    device = device_of(model)
    single = _durations(model, torch.from_numpy(images[:1].copy()).to(device), repeats)
    batch = torch.from_numpy(images[:BATCH].copy()).to(device)
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
    seconds = []
    with torch.inference_mode():
        for _ in range(3 + repeats):
            start = time.perf_counter()
            model(images).argmax(1).cpu()  # the copy waits for the device
            seconds.append(time.perf_counter() - start)
    return seconds[3:]
