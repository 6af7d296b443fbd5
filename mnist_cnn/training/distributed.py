"""Training in several processes of one machine, one for each GPU or several on its CPU.

`train_distributed` starts torch's elastic launcher, whose workers run this module as a program.
Parent and workers exchange files in one folder and nothing else, so workers need no platform:

    images.npy labels.npy config.json   data and configuration
    checkpoints/                        of the workers; the parent copies them to its own store
    events.jsonl                        progress, epochs and failure, by the first worker
    stop                                the reason to stop, written by the parent
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import distributed
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined] # documented, but not in torch's own stubs

from mnist_cnn.device import Device, choose_device
from mnist_cnn.digits import Digits
from mnist_cnn.training.checkpoint import CheckpointStore, LocalCheckpoints, Writer, decode
from mnist_cnn.training.loader import Batches
from mnist_cnn.training.loop import (
    AccuracyCollapsed,
    EpochMetrics,
    Progress,
    Training,
    TrainingStopped,
    train,
)
from mnist_cnn.training.recipe import TrainingConfig

_POLL_SECONDS = 0.1

_FETCHED = 3
"""Newest checkpoints of the caller's store that the workers get: a broken one costs an interval."""

_TIMEOUT = timedelta(minutes=2)
"""Longest wait of a worker for the others; then it fails, and the group is restarted."""

_EVENTS = "events.jsonl"

_FINAL: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (ValueError, FloatingPointError, AccuracyCollapsed, MemoryError)
}
"""Exceptions that all workers raise at the same step and would raise again after a restart."""


def train_distributed(
    digits: Digits,
    config: TrainingConfig,
    processes: int,
    device: Device = "auto",
    *,
    on_progress: Callable[[Progress], None] = lambda _: None,
    on_epoch: Callable[[EpochMetrics], None] = lambda _: None,
    checkpoints: CheckpointStore | None = None,
    stop: Callable[[], str | None] = lambda: None,
    restarts: int = 3,
) -> Training:
    """Train in several processes; after the death of one, all resume from the last checkpoint.

    The arguments are those of `train`; callbacks and the store are used in this process alone. The
    images are in the same order as in one process. Weights differ only by the order in which sums
    are rounded, which from the second epoch on can also exchange two images at the threshold of
    the hard ones.

    Raises the errors of `train`, and RuntimeError if the workers fail more than `restarts` times.
    """
    chosen = choose_device(device)
    if chosen.type == "cuda" and processes > torch.cuda.device_count():
        raise ValueError(
            f"{processes} processes want a GPU each; this machine has {torch.cuda.device_count()}"
        )
    # Raises ValueError for unfit digits before a process is started.
    Batches(digits, config, torch.device("cpu"), 0, processes)
    with tempfile.TemporaryDirectory(prefix="training-") as scratch:
        folder = Path(scratch)
        local = LocalCheckpoints(folder / "checkpoints")
        if checkpoints is not None:
            for name in sorted(checkpoints.list())[-_FETCHED:]:
                local.save(name, checkpoints.load(name))
        np.save(folder / "images.npy", digits.images)
        np.save(folder / "labels.npy", digits.labels)
        (folder / "config.json").write_text(config.model_dump_json())
        writer = Writer(checkpoints) if checkpoints is not None else None
        events = _EventLog(folder / _EVENTS, on_progress, on_epoch)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={processes}", f"--max-restarts={restarts}"]
        command += ["-m", "mnist_cnn.training.distributed", scratch, chosen.type]
        with (folder / "log").open("wb") as log:
            launcher = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)  # noqa: S603 - our own command
            try:
                seen = set(local.list())
                while launcher.poll() is None:
                    time.sleep(_POLL_SECONDS)
                    events.read_new()
                    seen = _submit_newest(local, seen, writer)
                    if (reason := stop()) is not None:
                        (folder / "stop").write_text(reason)
                # The last events and checkpoints are from between the last poll and the end.
                events.read_new()
                _submit_newest(local, seen, writer)
            finally:
                launcher.terminate()
                launcher.wait()
                if writer:
                    writer.close()
        failure = events.failure
        if isinstance(failure, TrainingStopped):
            # The workers' checkpoints are deleted with the folder; the caller's store remains.
            saved = writer is not None and writer.newest == failure.step
            failure = TrainingStopped(failure.reason, failure.step, failure.steps, saved=saved)
        if failure is not None:
            raise failure
        if launcher.returncode:
            output = (folder / "log").read_text(errors="replace")
            raise RuntimeError(
                f"{processes} training processes failed more than {restarts} times; the last of "
                f"what they said:\n{output[-4000:]}"
            )
        # The last checkpoint is of a finished training: resuming from it takes no step.
        training = train(digits, config, device, checkpoints=local)
        return replace(training, warnings=writer.failures if writer else [])


def _submit_newest(local: LocalCheckpoints, seen: set[str], writer: Writer | None) -> set[str]:
    """Submit the newest checkpoint if it was not seen before; return all names seen."""
    names = set(local.list())
    if writer and (new := names - seen):
        newest = max(new)
        with suppress(FileNotFoundError):  # the workers may have removed it for a newer one
            writer.submit(decode(local.load(newest), newest))
    return names


class _EventLog:
    """The first worker's events, a line of JSON each, passed on to the callbacks."""

    def __init__(
        self,
        path: Path,
        on_progress: Callable[[Progress], None],
        on_epoch: Callable[[EpochMetrics], None],
    ) -> None:
        self._path = path
        self._offset = 0
        self._last_step = 0
        self._on_progress = on_progress
        self._on_epoch = on_epoch
        self.failure: Exception | None = None
        """Exception that all workers raised at the same step."""

    def read_new(self) -> None:
        """Apply the events appended since the last call; a line still being written has to wait."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            appended = file.read()
        whole = appended[: appended.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            self._apply_event(**json.loads(line))

    def _apply_event(self, kind: str, about: dict[str, Any]) -> None:
        if kind == "epoch":
            metrics = EpochMetrics(**about)
            if metrics.step > self._last_step:  # after a restart, epochs are repeated
                self._last_step = metrics.step
                self._on_epoch(metrics)
        elif kind == "progress":
            self._on_progress(Progress(**about))
        elif kind == "stopped":
            self.failure = TrainingStopped(**about)
        else:
            self.failure = _FINAL[kind](about["sentence"])


def _rendezvous_store() -> PrefixStore:
    """Return the launcher's store with a prefix for this attempt of the group.

    The launcher keeps one store for all attempts. Without a prefix, restarted workers can find the
    addresses of dead ones, and wait for a process that has nothing to do with them.
    """
    host = os.environ["MASTER_ADDR"]
    port = int(os.environ["MASTER_PORT"])
    attempt = f"attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}"
    store = TCPStore(host, port, is_master=False, timeout=_TIMEOUT)
    return PrefixStore(attempt, store)


def _run_worker(folder: Path, device: Device) -> None:
    """Train as one worker of the group."""
    distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        store=_rendezvous_store(),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=_TIMEOUT,
    )
    if device == "cuda":
        torch.cuda.set_device(distributed.get_node_local_rank())
    leads = distributed.get_rank() == 0
    # Mapped, not read: all workers of the machine share one copy of the images.
    digits = Digits(np.load(folder / "images.npy", mmap_mode="r"), np.load(folder / "labels.npy"))
    config = TrainingConfig.model_validate_json((folder / "config.json").read_text())

    def write(kind: str, about: dict[str, Any]) -> None:
        if leads:
            with (folder / _EVENTS).open("a") as file:
                file.write(json.dumps({"kind": kind, "about": about}) + "\n")

    def stop_requested() -> str | None:
        path = folder / "stop"
        return path.read_text() if path.exists() else None

    try:
        train(
            digits,
            config,
            device,
            on_progress=lambda progress: write("progress", asdict(progress)),
            on_epoch=lambda metrics: write("epoch", asdict(metrics)),
            checkpoints=LocalCheckpoints(folder / "checkpoints"),
            stop=stop_requested,
        )
    except TrainingStopped as stopped:
        about = {"reason": stopped.reason, "step": stopped.step, "steps": stopped.steps}
        write("stopped", about | {"saved": stopped.saved})
    except tuple(_FINAL.values()) as error:
        write(type(error).__name__, {"sentence": str(error)})
    finally:
        distributed.destroy_process_group()


if __name__ == "__main__":
    _run_worker(Path(sys.argv[1]), cast("Device", sys.argv[2]))
