"""Checkpoints: safetensors with a digest over everything, written beside the training.

Nothing in them is executed on loading. Names sort by step: `step-00000300.safetensors`.
"""

import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

_log = logging.getLogger(__name__)
_FORMAT = "mnist-cnn-checkpoint-1"
_PREFIX, _SUFFIX = "step-", ".safetensors"


class CheckpointRefused(ValueError):
    """A checkpoint cannot be gone on from; the message says why."""


class CheckpointStore(Protocol):
    """Where checkpoints are kept. A name that is listed must hold all of its bytes."""

    def save(self, name: str, content: bytes) -> None:
        """Keep `content` under `name`, wholly or not at all; older names may be dropped."""

    def list(self) -> list[str]:
        """Return the names that are kept, in any order."""

    def load(self, name: str) -> bytes:
        """Return what is kept under `name`."""


@dataclass(frozen=True)
class Checkpoint:
    """The state of a training between two steps."""

    step: int
    """Optimizer steps that were taken."""
    identity: Mapping[str, str]
    """What the state belongs to, part by part: data, config, code, architecture."""
    progress: Mapping[str, Any]
    """JSON values: the position in the epoch, the metrics so far."""
    tensors: Mapping[str, Tensor]
    """On the CPU."""

    @property
    def name(self) -> str:
        """The name to keep it under."""
        return f"{_PREFIX}{self.step:08d}{_SUFFIX}"

    def encode(self) -> bytes:
        """Return the checkpoint as the bytes of a safetensors file."""
        from safetensors.torch import save

        about = {"step": self.step, "identity": self.identity, "progress": self.progress}
        state = json.dumps(about, sort_keys=True)
        return save(
            {name: tensor.contiguous() for name, tensor in self.tensors.items()},
            {"format": _FORMAT, "state": state, "sha256": _digest(state, self.tensors)},
        )


def decode(content: bytes, name: str) -> Checkpoint:
    """Parse and verify a checkpoint; CheckpointRefused names it and says what is wrong."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(content)
        length = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + length]).get("__metadata__") or {}
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointRefused(
            f"checkpoint {name} ({len(content)} bytes) is no whole safetensors file: {error}"
        ) from error
    if metadata.get("format") != _FORMAT:
        raise CheckpointRefused(
            f"checkpoint {name} has format {metadata.get('format')!r}; expected {_FORMAT!r}"
        )
    state = metadata.get("state", "")
    promised, found = metadata.get("sha256"), _digest(state, tensors)
    if promised != found:
        raise CheckpointRefused(
            f"checkpoint {name} promises sha256 {promised} but holds {found}: it was altered"
        )
    about = json.loads(state)
    return Checkpoint(about["step"], about["identity"], about["progress"], tensors)


def newest_valid(
    store: CheckpointStore, identity: Mapping[str, str]
) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest checkpoint of this identity, or None, and why newer ones were refused.

    A store that cannot be read raises what it raises: starting anew would waste the work.
    """
    refusals: list[str] = []
    names = [n for n in store.list() if n.startswith(_PREFIX) and n.endswith(_SUFFIX)]
    for name in sorted(names, reverse=True):
        try:
            checkpoint = decode(store.load(name), name)
            _check_identity(checkpoint, name, identity)
        except CheckpointRefused as refusal:
            _log.warning("%s", refusal)
            refusals.append(str(refusal))
        else:
            return checkpoint, refusals
    return None, refusals


def _check_identity(checkpoint: Checkpoint, name: str, identity: Mapping[str, str]) -> None:
    foreign = [part for part in identity if checkpoint.identity.get(part) != identity[part]]
    if foreign:
        raise CheckpointRefused(
            f"checkpoint {name} was written with other {' and '.join(foreign)} than this training: "
            + "; ".join(
                f"{part} {checkpoint.identity.get(part)!r}, expected {identity[part]!r}"
                for part in foreign
            )
        )


def _digest(state: str, tensors: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256(state.encode())
    for name, tensor in sorted(tensors.items()):
        total.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


class LocalCheckpoints:
    """Checkpoints in a folder of this machine: the newest `keep` of them."""

    def __init__(self, folder: Path, keep: int = 3) -> None:
        self._folder, self._keep = folder, keep

    def save(self, name: str, content: bytes) -> None:
        """Write to a temporary file, force it to the disk, then give it its name."""
        self._folder.mkdir(parents=True, exist_ok=True)
        draft = self._folder / f".{name}.{os.getpid()}"
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self._folder / name)
        for old in sorted(self.list())[: -self._keep]:
            (self._folder / old).unlink(missing_ok=True)

    def list(self) -> list[str]:
        """Return the names in the folder; none if it is not there."""
        if not self._folder.is_dir():
            return []
        return [path.name for path in self._folder.iterdir() if not path.name.startswith(".")]

    def load(self, name: str) -> bytes:
        """Read one file."""
        return (self._folder / name).read_bytes()


class Writer:
    """Hands checkpoints to one background thread, so that training waits for no store.

    Only the newest waiting one is written: a slow store falls behind in number, not in age. One
    that the store refuses is logged; the next is tried at the next interval.
    """

    def __init__(self, store: CheckpointStore) -> None:
        self._store = store
        self._waiting: Checkpoint | None = None
        self._closing = False
        self._wake = threading.Condition()
        self.failures: list[str] = []
        """A sentence for each checkpoint that could not be written."""
        self.newest: int | None = None
        """The step of the newest checkpoint that was written."""
        self._thread = threading.Thread(target=self._work, name="checkpoints", daemon=True)
        self._thread.start()

    def submit(self, checkpoint: Checkpoint) -> None:
        """Have this checkpoint written soon; returns at once."""
        with self._wake:
            self._waiting = checkpoint
            self._wake.notify()

    def close(self) -> None:
        """Return when everything that was submitted has been written or has failed."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._waiting or self._closing)
                checkpoint, self._waiting = self._waiting, None
            if checkpoint is None:
                return
            self._write(checkpoint)

    def _write(self, checkpoint: Checkpoint) -> None:
        began = time.perf_counter()
        try:
            self._store.save(checkpoint.name, checkpoint.encode())
        except Exception as error:  # noqa: BLE001 - any store may fail in its own way; training goes on
            sentence = (
                f"checkpoint {checkpoint.name} could not be written ({error!r}); training goes on "
                "and the next one is tried at the next interval"
            )
            _log.warning("%s", sentence)
            self.failures.append(sentence)
        else:
            self.newest = checkpoint.step
            _log.debug("wrote %s in %.3f s", checkpoint.name, time.perf_counter() - began)
