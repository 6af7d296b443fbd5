"""Know again what has been tried before: the same data, code, parameters and environment."""

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

from pydantic import BaseModel

from tasks.records import Snapshot

if TYPE_CHECKING:
    from mnist_cnn.device import Device
    from mnist_cnn.promotion import PromotionPolicy
    from mnist_cnn.training import TrainingConfig

TAG = "fingerprint"
"""The tag of a registered version that says what it was made of."""

_ROOMS = ("flows", "tasks", "mnist_cnn", "expectations")
_PROJECT = "mnist-retraining"
_NAME = re.compile(r"[\w.-]+")


class Fingerprint(BaseModel, frozen=True):
    """What a candidate is made of and judged by: equal fingerprints mean equal outcomes."""

    snapshot: str
    code: str
    parameters: str
    environment: str

    def changes(self, other: "Fingerprint") -> list[str]:
        """Name what differs."""
        return [part for part, value in self if getattr(other, part) != value]


def fingerprint(
    snapshot: Snapshot,
    training: "TrainingConfig",
    promotion: "PromotionPolicy | None",
    device: "Device",
    processes: int,
) -> Fingerprint:
    """Return the fingerprint of a run that has not begun."""
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
def digest_code(*rooms: str) -> str:
    """Return the SHA-256 of the code and templates of some of our rooms, by default all."""
    root, total = Path(__file__).parents[2], hashlib.sha256()
    for room in rooms or _ROOMS:
        for file in sorted((root / room).rglob("*")):
            if file.is_file() and file.suffix != ".pyc":
                total.update(f"{file.relative_to(root).as_posix()}\0".encode())
                total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def _dependencies() -> list[str]:
    """Return the names of what the project needs, without its extras."""
    needs = [need for need in requires(_PROJECT) or [] if "extra ==" not in need]
    return sorted({_NAME.findall(need)[0] for need in needs})


def _digest(values: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
