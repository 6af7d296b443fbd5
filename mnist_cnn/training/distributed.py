"""Train in several processes of one machine, one for each GPU or some on its CPU.

`train_distributed` starts torch's own elastic launcher, whose workers are this module run as a
program. They meet their parent in a folder alone, so that they need to know no platform:

    images.npy labels.npy config.json   what to train on, and how
    checkpoints/                        theirs; the parent carries them to its own store
    told.jsonl                          what the first worker has to tell
    stop                                a reason to stop, once the parent has one
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

_SECONDS_BETWEEN_LOOKS = 0.1
_FETCHED = 3
_PATIENCE = timedelta(minutes=2)  # for the others, before a worker fails and the group starts anew
_TOLD = "told.jsonl"
# What every worker meets at the same step and would meet again: no case for a restart.
_FINAL: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (ValueError, FloatingPointError, AccuracyCollapsed, MemoryError)
}


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
    """Train as `train` does, in several processes; a killed one has all go on from a checkpoint.

    The images come in the same order as in one process, and the weights differ only by the order in
    which sums are rounded; from the second epoch on that may also exchange two images of which one
    just is among the hard ones. Callbacks and the store are used in this process.

    Raises what `train` raises, and RuntimeError if the workers fail more than `restarts` times.
    """
    place = choose_device(device)
    if place.type == "cuda" and processes > torch.cuda.device_count():
        raise ValueError(
            f"{processes} processes want a GPU each; this machine has {torch.cuda.device_count()}"
        )
    Batches(digits, config, torch.device("cpu"), 0, processes)  # refuses before anything is started
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
        told = _EventLog(folder / _TOLD, on_progress, on_epoch)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={processes}", f"--max-restarts={restarts}"]
        command += ["-m", "mnist_cnn.training.distributed", scratch, place.type]
        with (folder / "log").open("wb") as log:
            launcher = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)  # noqa: S603 - our own words
            try:
                carried = set(local.list())
                while launcher.poll() is None:
                    time.sleep(_SECONDS_BETWEEN_LOOKS)
                    told.listen()
                    carried = _carry(local, carried, writer)
                    if (reason := stop()) is not None:
                        (folder / "stop").write_text(reason)
                told.listen()
                _carry(local, carried, writer)
            finally:
                launcher.terminate()
                launcher.wait()
                if writer:
                    writer.close()
        failure = told.failure
        if isinstance(failure, TrainingStopped):
            # What the workers kept goes with the folder; what counts is the caller's store.
            saved = writer is not None and writer.newest == failure.step
            failure = TrainingStopped(failure.reason, failure.step, failure.steps, saved=saved)
        if failure is not None:
            raise failure
        if launcher.returncode:
            said = (folder / "log").read_text(errors="replace")
            raise RuntimeError(
                f"{processes} training processes failed more than {restarts} times; the last of "
                f"what they said:\n{said[-4000:]}"
            )
        # The last checkpoint is a finished training: going on from it takes no step.
        training = train(digits, config, device, checkpoints=local)
        return replace(training, warnings=writer.failures if writer else [])


def _carry(local: LocalCheckpoints, carried: set[str], writer: Writer | None) -> set[str]:
    """Hand the newest checkpoint to the writer if it is new; return the names that were seen."""
    names = set(local.list())
    if writer and (new := names - carried):
        newest = max(new)
        with suppress(FileNotFoundError):  # a newer one has taken its place since
            writer.submit(decode(local.load(newest), newest))
    return names


class _EventLog:
    """What the first worker has told, line by line, each epoch once."""

    def __init__(
        self,
        path: Path,
        on_progress: Callable[[Progress], None],
        on_epoch: Callable[[EpochMetrics], None],
    ) -> None:
        self._path, self._place, self._newest = path, 0, 0
        self._on_progress, self._on_epoch = on_progress, on_epoch
        self.failure: Exception | None = None
        """What every worker met at the same step."""

    def listen(self) -> None:
        """Call back for what is new."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._place)
            news = file.read()
        whole = news[: news.rfind(b"\n") + 1]
        self._place += len(whole)
        for line in whole.splitlines():
            self._apply_event(**json.loads(line))

    def _apply_event(self, kind: str, about: dict[str, Any]) -> None:
        if kind == "epoch":
            metrics = EpochMetrics(**about)
            if metrics.step > self._newest:  # after a restart, epochs are told again
                self._newest = metrics.step
                self._on_epoch(metrics)
        elif kind == "progress":
            self._on_progress(Progress(**about))
        elif kind == "stopped":
            self.failure = TrainingStopped(**about)
        else:
            self.failure = _FINAL[kind](about["sentence"])


def _meeting_place() -> PrefixStore:
    """Return the launcher's store, with names of their own for each attempt of the group.

    The launcher keeps one store for all attempts. Without the prefix, workers that are started anew
    may find the addresses of those that died, and wait for whoever answers there now.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    attempt = f"attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}"
    store = TCPStore(host, port, is_master=False, timeout=_PATIENCE)
    return PrefixStore(attempt, store)


def _work(folder: Path, device: Device) -> None:
    """Train as one worker of the group."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        store=_meeting_place(),
        rank=rank,
        world_size=world,
        timeout=_PATIENCE,
    )
    if device == "cuda":
        torch.cuda.set_device(distributed.get_node_local_rank())
    leads = distributed.get_rank() == 0
    digits = Digits(np.load(folder / "images.npy", mmap_mode="r"), np.load(folder / "labels.npy"))
    config = TrainingConfig.model_validate_json((folder / "config.json").read_text())

    def write(kind: str, about: dict[str, Any]) -> None:
        if leads:
            with (folder / _TOLD).open("a") as file:
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
    _work(Path(sys.argv[1]), cast("Device", sys.argv[2]))
