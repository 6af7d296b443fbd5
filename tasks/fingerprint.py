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

from prefect import get_run_logger, runtime, task
from pydantic import BaseModel

from mnist_cnn.device import Device, choose_device
from mnist_cnn.promotion import PromotionPolicy
from mnist_cnn.training import TrainingConfig
from tasks.records import ModelVersion, Snapshot
from tasks.storage import worth_another_try

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
    training: TrainingConfig,
    promotion: PromotionPolicy | None,
    device: Device,
    processes: int,
) -> Fingerprint:
    """Return the fingerprint of a run that has not begun."""
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


@task(retries=2, retry_delay_seconds=[2, 10], retry_condition_fn=worth_another_try)
def find_repeat(champion: ModelVersion | None, ours: Fingerprint) -> str | None:
    """Say in a sentence why a run would only repeat another one; None if it would not.

    It would if the champion, or a version that lost against the present champion, is made of the
    same. A version that somebody rolled back is not made again either.
    """
    if champion is None:
        return None
    from mlflow import MlflowClient  # noqa: PLC0415 - 2 s to import

    client, logger = MlflowClient(), get_run_logger()
    page = client.search_model_versions(f"name = '{champion.name}'")
    versions = list(page)
    while page.token:
        page = client.search_model_versions(f"name = '{champion.name}'", page_token=page.token)
        versions += page
    tags = {str(version.version): version.tags for version in versions}
    same = "the same snapshot, code, parameters and environment"
    for number in sorted(tags, key=int, reverse=True):
        made_of, verdict = tags[number].get(TAG), tags[number].get("verdict")
        mine = tags[number].get("prefect.flow_run_id") == str(runtime.flow_run.id)
        if not made_of or mine:
            continue
        theirs = Fingerprint.model_validate_json(made_of)
        if number == champion.version and theirs != ours:
            logger.info(
                "changed since the champion was trained: %s", ", ".join(ours.changes(theirs))
            )
        if theirs != ours:
            continue
        if number == champion.version:
            return f"nothing is new: the champion, version {number}, was trained on {same}"
        if verdict != "promote" and tags[number].get("compared_with") == champion.model:
            return (
                f"nothing is new: version {number} was made of {same}, and judged {verdict!r} "
                f"against today's champion, version {champion.version}"
            )
        if _rolled_back(tags[champion.version], number):
            return (
                f"nothing is new: version {number} was made of {same}, and was rolled back to "
                f"today's champion, version {champion.version}"
            )
    return None


@cache
def digest_code() -> str:
    """Return the SHA-256 of the project's own code and templates."""
    root, total = Path(__file__).parents[1], hashlib.sha256()
    for room in _ROOMS:
        for file in sorted((root / room).rglob("*")):
            if file.is_file() and file.suffix != ".pyc":
                total.update(f"{file.relative_to(root).as_posix()}\0".encode())
                total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def _rolled_back(tags_of_champion: dict[str, str], number: str) -> bool:
    """Tell whether the champion took its place back from version `number`."""
    moves = [
        json.loads(text) for key, text in tags_of_champion.items() if key.startswith("history.")
    ]
    return any(move["action"] == "roll back" and move["from_version"] == number for move in moves)


def _dependencies() -> list[str]:
    """Return the names of what the project needs, without its extras."""
    needs = [need for need in requires(_PROJECT) or [] if "extra ==" not in need]
    return sorted({_NAME.findall(need)[0] for need in needs})


def _digest(values: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
