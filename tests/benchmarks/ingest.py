"""Measure what arrives: images a second from a dropped batch to accepted shards, and memory.

    MNIST_MIRROR=file:///folder/with/the/four/archives python -m tests.benchmarks.ingest

The real tasks on a real stack of their own. MNIST is the base; a batch is MNIST's 60,000 training
images moved by a pixel or two, another way each. One process takes the batches one after the other,
and says after each how much memory it has taken at most, its imports included.

Then false alarms: a random half of the training images is the base, and the champion is trained on
it; honest batches are random ones of the others. Nothing here passes or fails: read the table.
"""

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from prefect.logging import disable_run_logger

from deployments.stack import PROJECT, Ports, Stack, environment, start, stop
from expectations.champion_view import contradictions
from expectations.image_table import image_table
from expectations.reference import reference_profile
from expectations.validation import validate_batch
from mnist_cnn.digits import Digits
from mnist_cnn.idx import write_idx
from tasks import keys
from tasks.arrivals.batch_files import write_parquet
from tasks.datasets.ledger import present_snapshot, read_base, read_ledger, write_base
from tasks.datasets.mirror import fetch_mnist
from tasks.datasets.snapshots import write_snapshot
from tasks.services.s3 import DEFAULT_STORE, Store

MOVES = [(1, 0), (0, 1), (-1, 0), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1), (2, 0), (0, 2)]
"""Pixels down and right. Further away MNIST's digits look to the expectations as if mirrored."""

Files = dict[str, bytes]
FORMATS: dict[str, Callable[[Digits], Files]] = {
    "IDX": lambda digits: _pair(digits, lambda raw: raw, ""),
    "IDX gzipped": lambda digits: _pair(digits, lambda raw: gzip.compress(raw, 6), ".gz"),
    "PNG-Parquet": lambda digits: {"part-0.parquet": write_parquet(digits)},
}


def _pair(digits: Digits, pack: Callable[[bytes], bytes], end: str) -> Files:
    return {
        f"b-images-idx3-ubyte{end}": pack(write_idx(digits.images)),
        f"b-labels-idx1-ubyte{end}": pack(write_idx(digits.labels.astype(np.uint8))),
    }


def drop(store: Store, dataset: str, batch: str, digits: Digits, form: str) -> None:
    """Put a batch where producers put it."""
    for name, content in FORMATS[form](digits).items():
        store.put(keys.incoming(dataset, batch, name), content)


def take(dataset: str, batches: list[str]) -> None:
    """Ingest batches in this process, and print a line of JSON about each."""
    from tasks.ingest import ingest_batch

    base = read_base(Store(DEFAULT_STORE), dataset)
    assert base
    for batch in batches:
        began = time.perf_counter()
        with disable_run_logger():
            verdict = ingest_batch.fn(base, batch, None)
        took = time.perf_counter() - began
        assert verdict
        peak = next(
            int(line.split()[1]) / 1024
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("VmHWM")
        )
        about = {"batch": batch, "accepted": verdict.accepted, "reason": verdict.reason}
        print(json.dumps(about | {"seconds": took, "peak_mib": peak}), flush=True)


def measure(train: Digits, test: Digits, batches: int) -> list[dict[str, Any]]:
    """Return one row a batch, for each format."""
    store, rows = Store(DEFAULT_STORE), []
    for form in FORMATS:
        dataset = form.lower().replace(" ", "-")
        snapshot = write_snapshot(store, dataset, train, test, "MNIST")
        write_base(store, snapshot)
        count = batches if form == "IDX" else 2
        names = [f"batch-{number:02d}" for number in range(count)]
        for name, move in zip(names, MOVES, strict=False):
            drop(
                store,
                dataset,
                name,
                Digits(np.roll(train.images, move, (1, 2)), train.labels),
                form,
            )
        command = [sys.executable, "-m", "tests.benchmarks.ingest", "--take", dataset, *names]
        done = subprocess.run(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True, check=True)
        for line in done.stdout.splitlines():
            row = {"format": form, "images": len(train), **json.loads(line)}
            rows.append(row)
            print(
                f"{form:12} {row['batch']} {row['images'] / row['seconds']:10,.0f} images/s "
                f"{row['seconds']:6.2f} s  peak {row['peak_mib']:6.0f} MiB  "
                f"{'accepted' if row['accepted'] else 'REFUSED'}: {row['reason']}",
                flush=True,
            )
        grown = present_snapshot(store, snapshot, read_ledger(store, dataset))
        print(f"{form:12} the snapshot has {grown.images('train'):,} training images")
    return rows


def count_false_alarms(train: Digits, test: Digits, batches: int) -> dict[str, object]:
    """Judge honest batches of 500 to 5,000 images, and say what failed how often."""
    from mnist_cnn.evaluation import predict
    from mnist_cnn.training import TrainingConfig
    from mnist_cnn.training import train as fit

    draw = np.random.default_rng(0)
    # At random: every other image of MNIST is by the other one of its two groups of writers, whose
    # slants differ so much that batches of one are rightly refused beside a base of the other.
    order = draw.permutation(len(train))
    base, others = (
        Digits(train.images[half], train.labels[half]) for half in np.array_split(order, 2)
    )
    champion = fit(base, TrainingConfig(preset="quick"), "cpu").model
    probabilities = predict(champion, others.images)
    known, holdout = image_table(base.images, base.labels), image_table(test.images, test.labels)
    accepted, reference = known["digest"].to_numpy(), reference_profile(known)
    refused, failed = 0, Counter[str]()
    for _ in range(batches):
        rows = draw.permutation(len(others))[: draw.integers(500, 5001)]
        table = image_table(others.images[rows], others.labels[rows])
        table["champion_contradicts"] = contradictions(probabilities[rows], others.labels[rows])
        report = validate_batch(table, accepted=accepted, holdout=holdout, reference=reference)
        refused += bool(report.critical)
        failed.update(f"{f.severity}: {f.column}" for f in (*report.critical, *report.warnings))
    print(f"false alarms: {refused} of {batches} honest batches refused; failed: {dict(failed)}")
    return {"batches": batches, "refused": refused, "failed": failed}


def main() -> None:
    """Print the table and write the figures beside it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=10, help="of 60,000 images, from IDX")
    parser.add_argument("--honest", type=int, default=200, help="batches for the false alarms")
    parser.add_argument("--json", type=Path, default=Path("benchmark.json"), help="%(default)s")
    parser.add_argument("--take", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.take:
        take(given.take[0], given.take[1:])
        return
    train, test = fetch_mnist()
    with tempfile.TemporaryDirectory() as folder:
        stack = Stack(Path(folder), Ports.free())
        try:
            start(stack, say=lambda _: None)
            os.environ |= environment(stack)
            rows = measure(train, test, given.batches)
        finally:
            stop(stack, say=lambda _: None)
    alarms = count_false_alarms(train, test, given.honest)
    given.json.write_text(json.dumps({"batches": rows, "false alarms": alarms}, indent=1))


if __name__ == "__main__":
    main()
