"""Measure what an evaluation costs against clean passes, its memory, and how it grows.

    MNIST_MIRROR=file:///folder/with/the/four/archives \
        python -m tests.benchmarks.evaluation [--threads 1] [--json evaluation.json]

CPU time, not wall time, so that a busy machine matters less; weights are random, which costs the
same as trained ones. Without MNIST_MIRROR the embedded sample is repeated up to 10,000 images.
"""

import argparse
import json
import os
import resource
import statistics
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from mnist_cnn.digits import Digits
from mnist_cnn.evaluation import evaluate, measure, measure_all, predict
from mnist_cnn.evaluation.corruptions import CORRUPTIONS, Corruption
from mnist_cnn.evaluation.shift import measure_shift
from mnist_cnn.idx import digits_from_idx
from mnist_cnn.model import DigitCNN
from mnist_cnn.sample import embedded_sample

IMAGES = 10_000


def load_digits() -> tuple[str, Digits, Digits]:
    mirror = os.environ.get("MNIST_MIRROR")
    if mirror is None:
        training, test = embedded_sample()
        many = np.resize(np.arange(len(test)), IMAGES)
        return "embedded sample, repeated", training, Digits(test.images[many], test.labels[many])

    def fetch(name: str) -> bytes:
        with urllib.request.urlopen(f"{mirror.rstrip('/')}/{name}-ubyte.gz") as response:  # noqa: S310 - the mirror that the caller names
            content: bytes = response.read()
        return content

    training, test = (
        digits_from_idx(fetch(f"{split}-images-idx3"), fetch(f"{split}-labels-idx1"), split)
        for split in ("train", "t10k")
    )
    return "MNIST", training, test


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def conditions_of(corruptions: tuple[Corruption, ...]) -> int:
    return sum(len(corruption.strengths) for corruption in corruptions)


def main() -> None:
    """Print a table and write the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path("evaluation.json"))
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    data, training, test = load_digits()
    torch.manual_seed(0)
    model = DigitCNN().eval()
    predict(model, test.images)
    before = peak_mib()

    def whole() -> None:
        shift = measure_shift(training, test)
        outcomes = measure(model, test)
        evaluate(outcomes, test, model="m", snapshot="s", outcomes="o", shift=shift)

    # Clean passes on both sides of what is measured: a machine that slows down slows both.
    clean = [cpu_seconds(lambda: predict(model, test.images)) for _ in range(5)]
    start = time.perf_counter()
    full = cpu_seconds(whole)
    wall = time.perf_counter() - start
    extra = peak_mib() - before
    clean += [cpu_seconds(lambda: predict(model, test.images)) for _ in range(5)]
    one_pass = statistics.median(clean)
    passes = conditions_of(CORRUPTIONS)
    figures = {
        "data": data,
        "images": len(test),
        "threads": asked.threads,
        "conditions": passes,
        "clean_pass_cpu_s": one_pass,
        "evaluation_cpu_s": full,
        "evaluation_wall_s": wall,
        "cpu_per_clean_passes": full / (passes * one_pass),
        "peak_extra_mib": extra,
    }
    for name, value in figures.items():
        print(f"{name:24} {value:.3f}" if isinstance(value, float) else f"{name:24} {value}")
    print(f"\n{'images':>8} {'conditions':>10} {'CPU s':>8} {'CPU µs per image and condition':>32}")
    growth = []
    for images in (len(test) // 4, len(test) // 2):
        for corruptions in (CORRUPTIONS[::4], CORRUPTIONS[::2]):
            part = Digits(test.images[:images], test.labels[:images])
            several = {"m": model}
            spent = cpu_seconds(lambda: measure_all(several, part, 0, corruptions))  # noqa: B023 - called at once
            unit = spent / images / (conditions_of(corruptions) + 1) * 1e6
            growth.append([images, conditions_of(corruptions), spent, unit])
            print(f"{images:8} {conditions_of(corruptions):10} {spent:8.2f} {unit:32.2f}")
    asked.json.write_text(json.dumps({**figures, "growth": growth}, indent=1))


if __name__ == "__main__":
    main()
