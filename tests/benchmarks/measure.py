"""One measurement in a process of its own: `python -m tests.benchmarks.measure '{"job": …}'`.

The last line of the output is a JSON object. Seconds are of the wall, memory is in MiB.
"""

import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from mnist_cnn.device import Device, choose_device, choose_precision
from mnist_cnn.digits import SIDE, Digits
from mnist_cnn.idx import digits_from_idx
from mnist_cnn.model import DigitCNN
from mnist_cnn.sample import embedded_sample
from mnist_cnn.training import LocalCheckpoints, TrainingConfig, train
from mnist_cnn.training.onnx_graph import to_onnx

Result = dict[str, Any]
Predict = Callable[[Tensor], Tensor]

MIB = 2**20


def read_digits(split: str) -> Digits:
    """Return MNIST's `train` or `t10k` split from the mirror, or the sample if that is asked for.

    The environment's MNIST_MIRROR is the address of a folder with the four archives, or `sample`.
    """
    mirror = os.environ["MNIST_MIRROR"].rstrip("/")
    if mirror == "sample":
        return embedded_sample()[0 if split == "train" else 1]
    files = []
    for kind in ("images-idx3", "labels-idx1"):
        with urllib.request.urlopen(f"{mirror}/{split}-{kind}-ubyte.gz") as answer:  # noqa: S310 - whoever runs the benchmark names the address, a file included
            files.append(answer.read())
    return digits_from_idx(files[0], files[1], split)


def _config(preset: str, seed: int = 0) -> TrainingConfig:
    """Return a preset's config; the sample's few images are not shown for more than 40 steps."""
    config = TrainingConfig.model_validate({"preset": preset, "seed": seed})
    sample = os.environ["MNIST_MIRROR"] == "sample"
    return config.model_copy(update={"min_steps": 40} if sample else {})


@contextmanager
def timed(result: Result, name: str = "") -> Iterator[None]:
    """Add the wall and CPU seconds of the block to `result`."""
    cpu, wall = time.process_time(), time.perf_counter()
    yield
    result[f"{name}seconds"] = time.perf_counter() - wall
    result[f"{name}cpu_seconds"] = time.process_time() - cpu


def measure_peer(name: str, seed: int, device: Device, epochs: int | None = None) -> Result:
    """Train a peer's recipe, or the first epochs of it, and measure it on its test part."""
    from tests.benchmarks import baselines

    recipe, place = baselines.RECIPES[name], choose_device(device)
    train_part, held_part, test_part = recipe.split(read_digits("train"), read_digits("t10k"), seed)
    learnt, held = recipe.dataset(train_part), recipe.dataset(held_part)
    few = torch.utils.data.Subset(learnt, range(10 * recipe.batch_size))
    result: Result = {"epochs": epochs or recipe.epochs, "published_epochs": recipe.epochs}
    with timed(result, "warmup_"):
        baselines.fit(recipe, few, few, epochs=1, seed=seed, device=place)
    with timed(result):
        model = baselines.fit(
            recipe, learnt, held, epochs=result["epochs"], seed=seed, device=place
        )
        next(model.parameters()).detach().cpu()  # waits for a GPU to have finished
    accuracy = baselines.accuracy(model, test_part, recipe, place)
    return result | {"accuracy": accuracy, "images": result["epochs"] * len(train_part)}


def measure_ours(preset: str, seed: int, device: Device) -> Result:
    """Train one preset after a warm-up of 16 steps; measure the GEMM peak right after it."""
    config = _config(preset, seed)
    digits, recipe, place = read_digits("train"), config.recipe(), choose_device(device)
    result: Result = {"epochs": recipe.epochs}
    with timed(result, "warmup_"):
        _warm_up(digits, config, device)
    with timed(result):
        training = train(digits, config, device)
    dtype = choose_precision(config.precision, place)
    peak = gemm_peak(dtype, place)
    result["images"] = training.steps * recipe.batch_size
    result["flop_per_image"] = flop_per_image(training.model, recipe.batch_size)
    rate = result["flop_per_image"] * result["images"] / result["seconds"]
    return result | {
        "dtype": str(dtype).removeprefix("torch."),
        "gflops": rate / 1e9,
        "gemm_gflops": peak / 1e9,
        "gemm_share": rate / peak,
        "parameters": sum(p.numel() for p in training.model.parameters()),
        "accuracy": _accuracy(training.model, read_digits("t10k")),
    }


def _warm_up(digits: Digits, config: TrainingConfig, device: Device) -> None:
    images = 16 * config.recipe().batch_size
    few = Digits(digits.images[:images], digits.labels[:images])
    train(few, config.model_copy(update={"epochs": images / len(few), "min_steps": 0}), device)


@torch.inference_mode()
def _accuracy(model: Predict, digits: Digits) -> float:
    images, labels = torch.tensor(digits.images), torch.tensor(digits.labels)
    answers = torch.cat([model(batch).argmax(1) for batch in _split(images, 1000)])
    return float((answers == labels).double().mean())


def _split(images: Tensor, size: int) -> list[Tensor]:
    return [images[start : start + size] for start in range(0, len(images), size)]


def flop_per_image(model: DigitCNN, batch_size: int) -> float:
    """Return what the model's forward and backward pass cost per image; no optimizer, no shifts."""
    images = torch.zeros(batch_size, SIDE, SIDE, dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter:
        loss = functional.cross_entropy(model(images), torch.zeros(batch_size, dtype=torch.int64))
        torch.autograd.backward(loss)
    model.zero_grad()
    return float(counter.get_total_flops() / batch_size)


def gemm_peak(dtype: torch.dtype, place: torch.device, sides: tuple[int, ...] = ()) -> float:
    """Return the best FLOP/s of square matrix products, as many threads as torch uses."""
    best = 0.0
    for side in sides or ((1024, 2048, 4096) if place.type == "cpu" else (4096, 8192)):
        a, b, c = (torch.ones(side, side, dtype=dtype, device=place) for _ in range(3))
        for _ in range(6):
            start = time.perf_counter()
            torch.mm(a, b, out=c)
            float(c[0, 0])  # waits for a GPU
            best = max(best, 2 * side**3 / (time.perf_counter() - start))
    return best


def measure_profile(preset: str, device: Device) -> Result:
    """Return the operators that training spends its time in, the costliest first."""
    config, digits = _config(preset), read_digits("train")
    _warm_up(digits, config, device)
    with torch.profiler.profile() as profile:
        train(digits, config.model_copy(update={"epochs": 0.6}), device)
    rows = profile.key_averages()
    total = sum(row.self_cpu_time_total + row.self_device_time_total for row in rows)
    shares = {r.key: (r.self_cpu_time_total + r.self_device_time_total) / total for r in rows}
    return {"share": dict(sorted(shares.items(), key=lambda item: -item[1])[:15])}


def measure_checkpointing(preset: str, device: Device, pairs: int) -> Result:
    """Train with and without checkpoints in turn, in one warm process."""
    config, digits = _config(preset), read_digits("train")
    _warm_up(digits, config, device)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for pair in range(pairs):
        for on in (False, True) if pair % 2 else (True, False):
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                train(
                    digits,
                    config,
                    device,
                    checkpoints=LocalCheckpoints(Path(folder)) if on else None,
                )
                seconds[on].append(time.perf_counter() - start)
    ratios = [on / off for off, on in zip(seconds[False], seconds[True], strict=True)]
    return {
        "every_steps": config.checkpoint_every_steps,
        "ratio": ratios,
        "on": seconds[True],
        "off": seconds[False],
    }


class PeakMemory:
    """Sample this process's memory every 10 ms inside a `with` block.

    `resident` is everything, pages of mapped files included; `private` is without them. Both in
    MiB, the highest seen.
    """

    def __enter__(self) -> Self:
        self.resident = self.private = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        process = psutil.Process()
        while True:
            memory = process.memory_info()
            self.resident = max(self.resident, memory.rss / MIB)
            self.private = max(self.private, (memory.rss - getattr(memory, "shared", 0)) / MIB)
            if self._done.wait(0.01):
                return


def measure_memory(preset: str, device: Device, times: int, *, streamed: bool) -> Result:
    """Train one epoch on the data so many times over, shifted, in memory or from a mapped file.

    Memory is what comes on top of the process as it is after its imports, the data included.
    """
    config = _config(preset).model_copy(update={"epochs": 1.0})
    process = psutil.Process().memory_info()
    footprint, shared = process.rss / MIB, getattr(process, "shared", 0) / MIB
    with tempfile.TemporaryDirectory() as folder, PeakMemory() as peak:
        digits = _enlarge(read_digits("train"), times, Path(folder) if streamed else None)
        result: Result = {"images": len(digits), "data": digits.images.nbytes / MIB}
        with timed(result):
            training = train(digits, config, device)
    shown = training.steps * config.recipe().batch_size
    result["microseconds_per_image"] = result["seconds"] / shown * 1e6
    result["footprint"] = footprint
    result["peak_over_footprint"] = peak.resident - footprint
    result["private_over_footprint"] = peak.private - (footprint - shared)
    return result


def _enlarge(digits: Digits, times: int, folder: Path | None) -> Digits:
    """Return moved copies of the digits, in a file that is mapped if there is a folder."""
    shape = (times * len(digits), SIDE, SIDE)
    images: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
    if folder:
        images = np.memmap(folder / "images", np.uint8, "w+", shape=shape)
    else:
        images = np.empty(shape, np.uint8)
    for copy in range(times):
        moved = np.roll(digits.images, (copy % 5 - 2, copy // 5 % 5), axis=(1, 2))
        images[copy * len(digits) : (copy + 1) * len(digits)] = moved if copy else digits.images
    if folder and isinstance(images, np.memmap):
        images.flush()
        images = np.memmap(folder / "images", np.uint8, "c", shape=shape)
    return Digits(images, np.tile(digits.labels, times))


def measure_inference(preset: str, device: Device, rounds: int, *, compiled: bool) -> Result:
    """Time every way to predict in turn: all test images in batches, then one at a time."""
    model = train(read_digits("train"), _config(preset), device).model
    images = torch.tensor(read_digits("t10k").images)
    batched, single = _ways(model, compiled=compiled)
    result: Result = {"images": len(images), "agreement": {}}
    with torch.inference_mode():
        expected = model(images).argmax(1)
        for name, way in batched.items():
            answers = torch.cat([way(batch) for batch in _split(images, 1000)])
            result["agreement"][name] = float((answers.argmax(1) == expected).double().mean())
        for ways, part, size in ((batched, images, 1000), (single, images[:1000], 1)):
            times: dict[str, list[float]] = {name: [] for name in ways}
            for name, way in list(ways.items()) * rounds:
                start = time.perf_counter()
                for batch in _split(part, size):
                    way(batch)
                times[name].append(time.perf_counter() - start)
            kind, unit = ("batched_seconds", 1) if size > 1 else ("single_us", 1e6 / len(part))
            result[kind] = {name: statistics.median(t) * unit for name, t in times.items()}
    return result


def _ways(model: DigitCNN, *, compiled: bool) -> tuple[dict[str, Predict], dict[str, Predict]]:
    """Return the ways to predict in batches and those to predict one image."""
    import mlflow.pytorch
    import onnxruntime

    folded = model.folded()

    def bf16(images: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits: Tensor = folded(images)
            return logits

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(to_onnx(model), options)

    def onnx(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    with tempfile.TemporaryDirectory() as folder:
        two = np.zeros((2, SIDE, SIDE), np.uint8)
        plain = model.folded().to(memory_format=torch.contiguous_format)
        mlflow.pytorch.save_model(plain, folder, input_example=two, pip_requirements=["torch"])
        stored = mlflow.pytorch.load_model(folder)
        batched = {
            "eager fp32": model,
            "folded fp32": folded,
            "folded bf16": bf16,
            "stored program": stored,
            "onnxruntime": onnx,
        }
        if not compiled or not shutil.which("c++"):  # AOTInductor needs a C++ compiler
            return batched, dict(batched)
        one = torch.export.export(plain, (torch.zeros(1, SIDE, SIDE, dtype=torch.uint8),))
        package = torch._inductor.aoti_compile_and_package(
            one, package_path=f"{folder}/one.pt2", inductor_configs={"freezing": True}
        )
        return batched, {**batched, "AOTInductor": torch._inductor.aoti_load_package(package)}


JOBS: dict[str, Callable[..., Result]] = {
    "peer": measure_peer,
    "ours": measure_ours,
    "profile": measure_profile,
    "checkpointing": measure_checkpointing,
    "memory": measure_memory,
    "inference": measure_inference,
}


def main() -> None:
    """Run the job that the only argument describes and print its result as JSON."""
    job = json.loads(sys.argv[1])
    imports = time.time() - job.pop("spawned")
    if threads := job.pop("threads"):
        torch.set_num_threads(threads)
    result = JOBS[job.pop("job")](**job)
    result |= {"import_seconds": imports, "threads": torch.get_num_threads()}
    sys.stdout.write("\n" + json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
