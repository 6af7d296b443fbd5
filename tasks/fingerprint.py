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

from prefect import get_run_logger, runtime
from pydantic import BaseModel

from tasks.records import ModelVersion, Snapshot
from tasks.step import step
from tasks.versions import asking, moves_of, read_versions

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
    from mnist_cnn.device import choose_device  # noqa: PLC0415 - torch, which few users need

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


@step
def find_repeat(champion: ModelVersion | None, ours: Fingerprint) -> str | None:
    """Say in a sentence why a run would only repeat another one; None if it would not.

    It would if the champion, or a version that lost against the present champion, is made of the
    same. A version that somebody rolled back is not made again either.
    """
    if champion is None:
        return None
    with asking(f"the versions of {champion.name}"):
        versions = {str(version.version): version for version in read_versions(champion.name)}
    run = str(runtime.flow_run.id)
    if any(version.tags.get("prefect.flow_run_id") == run for version in versions.values()):
        return None  # an earlier attempt of this run came so far that it has a version to judge
    today = f"today's champion, version {champion.version}"
    undone = {
        move.from_version
        for move in moves_of(versions[champion.version])
        if move.action == "roll back"
    }
    for number in sorted(versions, key=int, reverse=True):
        tags = versions[number].tags
        if TAG not in tags:
            continue
        theirs = Fingerprint.model_validate_json(tags[TAG])
        same = f"version {number} was made of the same snapshot, code, parameters and environment"
        if number == champion.version and theirs != ours:
            changes = ", ".join(ours.changes(theirs))
            get_run_logger().info("changed since the champion was trained: %s", changes)
        elif theirs != ours:
            continue
        elif number == champion.version:
            return f"nothing is new: the champion, {same}"
        elif number in undone:
            return f"nothing is new: {same}, and was rolled back to {today}"
        elif tags["verdict"] != "promote" and tags["compared_with"] == champion.model:
            return f"nothing is new: {same}, and judged {tags['verdict']!r} against {today}"
    return None


@cache
def digest_code(*rooms: str) -> str:
    """Return the SHA-256 of the code and templates of some of our rooms, by default all."""
    root, total = Path(__file__).parents[1], hashlib.sha256()
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
