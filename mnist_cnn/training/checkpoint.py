"""Checkpoints: safetensors with a digest over all of it, written by a background thread.

Loading one executes nothing. Names sort by step: `step-00000300.safetensors`.
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
_PREFIX = "step-"
_SUFFIX = ".safetensors"


class CheckpointRefused(ValueError):
    """A checkpoint is unfit to resume from; the message has the reason."""


class CheckpointStore(Protocol):
    """A store of checkpoints. A name that is listed must hold all of its bytes."""

    def save(self, name: str, content: bytes) -> None:
        """Store `content` under `name`, all of it or nothing; older names may be removed."""

    def list(self) -> list[str]:
        """Return the stored names, in any order."""

    def load(self, name: str) -> bytes:
        """Return the content stored under `name`."""


@dataclass(frozen=True)
class Checkpoint:
    """The state of a training between two steps."""

    step: int
    """Optimizer steps taken."""
    identity: Mapping[str, str]
    """Data, config, code and architecture that the state belongs to."""
    progress: Mapping[str, Any]
    """JSON values: the position in the epoch, the metrics so far."""
    tensors: Mapping[str, Tensor]
    """By name, on the CPU."""

    @property
    def name(self) -> str:
        """The name in a store."""
        return f"{_PREFIX}{self.step:08d}{_SUFFIX}"

    def encode(self) -> bytes:
        """Return the checkpoint as the bytes of a safetensors file."""
        from safetensors.torch import save

        # The metadata of a safetensors file are strings, so the state is one of JSON.
        about = {"step": self.step, "identity": self.identity, "progress": self.progress}
        state = json.dumps(about, sort_keys=True)
        return save(
            {name: tensor.contiguous() for name, tensor in self.tensors.items()},
            {"format": _FORMAT, "state": state, "sha256": _digest(state, self.tensors)},
        )


def decode(content: bytes, name: str) -> Checkpoint:
    """Parse and verify a checkpoint; raise CheckpointRefused if it is broken or altered."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(content)
        # `load` drops the metadata. They are in the header: its length in 8 bytes, then JSON.
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
    promised = metadata.get("sha256")
    found = _digest(state, tensors)
    if promised != found:
        raise CheckpointRefused(
            f"checkpoint {name} promises sha256 {promised} but holds {found}: it was altered"
        )
    about = json.loads(state)
    return Checkpoint(about["step"], about["identity"], about["progress"], tensors)


def newest_valid(
    store: CheckpointStore, identity: Mapping[str, str]
) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest checkpoint of this identity, or None, and the refusals of newer ones.

    An exception of the store is not caught. A store that cannot be read is not an empty one:
    training from the start would waste the work in it.
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
        # The same bytes for every dtype, bfloat16 included, which numpy does not have.
        total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


class LocalCheckpoints:
    """A store in a folder of this machine, which keeps the newest `keep` checkpoints."""

    def __init__(self, folder: Path, keep: int = 3) -> None:
        self._folder = folder
        self._keep = keep

    def save(self, name: str, content: bytes) -> None:
        """Write to a temporary file, flush it to the disk, then rename it."""
        # A rename is atomic, and the leading dot hides the draft of a process that was killed.
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
        """Return the names in the folder; none if the folder does not exist."""
        if not self._folder.is_dir():
            return []
        return [path.name for path in self._folder.iterdir() if not path.name.startswith(".")]

    def load(self, name: str) -> bytes:
        """Read one file."""
        return (self._folder / name).read_bytes()


class Writer:
    """A background thread that writes checkpoints, so that training does not wait for the store.

    Of those that wait, only the newest is written: with a slow store checkpoints become fewer, not
    older. A failed write is logged, and training goes on; the next checkpoint is a new attempt.
    """

    def __init__(self, store: CheckpointStore) -> None:
        self._store = store
        self._waiting: Checkpoint | None = None
        self._closing = False
        self._wake = threading.Condition()
        self.failures: list[str] = []
        """A sentence for each failed write."""
        self.newest: int | None = None
        """Step of the newest checkpoint that was written."""
        self._thread = threading.Thread(target=self._work, name="checkpoints", daemon=True)
        self._thread.start()

    def submit(self, checkpoint: Checkpoint) -> None:
        """Schedule a checkpoint for writing; return at once."""
        with self._wake:
            self._waiting = checkpoint
            self._wake.notify()

    def close(self) -> None:
        """Wait until the last checkpoint submitted has been written or has failed."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._waiting or self._closing)
                # Taken under the lock and written without it: `submit` never waits for the store.
                checkpoint, self._waiting = self._waiting, None
            if checkpoint is None:
                return
            self._write(checkpoint)

    def _write(self, checkpoint: Checkpoint) -> None:
        began = time.perf_counter()
        try:
            self._store.save(checkpoint.name, checkpoint.encode())
        except Exception as error:  # noqa: BLE001 - each store has its own errors; training goes on
            sentence = (
                f"checkpoint {checkpoint.name} could not be written ({error!r}); training goes on "
                "and the next one is tried at the next interval"
            )
            _log.warning("%s", sentence)
            self.failures.append(sentence)
        else:
            self.newest = checkpoint.step
            _log.debug("wrote %s in %.3f s", checkpoint.name, time.perf_counter() - began)
