"""Fingerprints of runs: equal for the same data, code, parameters and environment."""

import hashlib
import json
import platform
import re
from collections.abc import Mapping
from functools import cache
from importlib.metadata import requires
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING

from mnist_cnn.record import Record
from tasks.records import Snapshot

if TYPE_CHECKING:
    from mnist_cnn.device import Device
    from mnist_cnn.promotion import PromotionPolicy
    from mnist_cnn.training import TrainingConfig

_ROOMS = ("flows", "tasks", "mnist_cnn", "expectations")
_PROJECT = "mnist-retraining"
_NAME = re.compile(r"[\w.-]+")


class Fingerprint(Record):
    """Origin of a candidate and of its verdict: equal fingerprints mean equal outcomes."""

    snapshot: str
    """Digest of the snapshot."""
    code: str
    """Digest of our code, that of the decision included."""
    parameters: str
    """Digest of the training configuration, the promotion policy and the number of processes."""
    environment: str
    """Digest of the versions of Python and the dependencies, and of the device."""

    def changes(self, other: "Fingerprint") -> list[str]:
        """Return the names of the fields that differ; the format is none of them."""
        parts = self.model_dump(exclude={"format"})
        return [part for part, value in parts.items() if getattr(other, part) != value]


def fingerprint(
    snapshot: Snapshot,
    training: "TrainingConfig",
    promotion: "PromotionPolicy | None",
    device: "Device",
    processes: int,
) -> Fingerprint:
    """Return the fingerprint of a run before it trains."""
    from mnist_cnn.device import choose_device

    parameters = {
        "training": training.model_dump(mode="json"),
        "promotion": promotion.model_dump(mode="json") if promotion else None,
        "processes": processes,
    }
    environment = {
        "python": platform.python_version(),
        "device": str(choose_device(device)),
        **{name: installed(name) for name in _dependencies()},
    }
    return Fingerprint(
        snapshot=snapshot.digest,
        code=digest_code(),
        parameters=_digest(parameters),
        environment=_digest(environment),
    )


@cache
def digest_code(*paths: str) -> str:
    """Return the SHA-256 of files, or of packages with their templates; by default of all of ours.

    Compiled files are left out.
    """
    root = Path(__file__).parents[2]
    total = hashlib.sha256()
    for path in paths or _ROOMS:
        for file in sorted([root / path, *(root / path).rglob("*")]):
            if file.is_file() and file.suffix != ".pyc":
                total.update(f"{file.relative_to(root).as_posix()}\0".encode())
                total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def _dependencies() -> list[str]:
    """Return the names of the project's dependencies, without those of its extras."""
    needs = [need for need in requires(_PROJECT) or [] if "extra ==" not in need]
    return sorted({_NAME.findall(need)[0] for need in needs})


def _digest(values: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
