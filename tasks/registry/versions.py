"""Read access to the MLflow model registry, with errors that name the cause and the remedy."""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.records import ModelVersion
from tasks.registry.history import Move
from tasks.services.addresses import without_credentials

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion as RegisteredVersion
    from mlflow.entities.model_registry import RegisteredModel

CHAMPION = "champion"
PREVIOUS = "previous"
CHALLENGER = "challenger"

_NEEDED_TAGS = ("snapshot", "verdict", "compared_with", "artifact_sha256", "accuracy")

_AWAY = {
    "INTERNAL_ERROR",  # MLflow's client uses it for failed connections, too
    "TEMPORARILY_UNAVAILABLE",
    "REQUEST_LIMIT_EXCEEDED",
    "RESOURCE_EXHAUSTED",
    "DEADLINE_EXCEEDED",
    "CANCELLED",
}
"""Codes of MLflow's errors that are transient, so that a retry may succeed."""


class RegistryError(RuntimeError):
    """The registry failed a read that a decision depends on, or refused a write."""


class RegistryUnreachable(RegistryError, ConnectionError):
    """The MLflow server does not respond, or is too busy; worth another try."""


class Refused(ValueError):
    """A person's request must not be carried out; the message gives the reason and the remedy."""


@contextmanager
def registry_errors(what: str) -> Iterator[None]:
    """Raise RegistryError in place of MLflow's errors; `what` is the subject of its message.

    It is a RegistryUnreachable if the server is away or busy. Works as a decorator, too.
    """
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except (MlflowException, RequestException, HTTPError) as error:
        address = os.environ["MLFLOW_TRACKING_URI"]
        sentence = without_credentials(
            f"{what} could not be read or written at {address} ({error})"
        )
        # Prefect logs the cause unchanged. Leave it out if the server's address holds a password.
        cause = error if without_credentials(address) == address else None
        if _is_away(error):
            raise RegistryUnreachable(
                f"{sentence}; nothing is promoted: repair the MLflow server and run again"
            ) from cause
        raise RegistryError(
            f"{sentence}; nothing is promoted: correct what MLflow refuses and run again"
        ) from cause


def _is_away(error: Exception) -> bool:
    """Return True for errors of MLflow's client, or of requests below it, that are transient."""
    code = getattr(error, "error_code", None)
    if code:
        return code in _AWAY
    response = getattr(error, "response", None)
    busy = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS}
    return (
        response is None
        or response.status_code in busy
        or response.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR
    )


def find_version(name: str, alias: str) -> ModelVersion | None:
    """Return the version with an alias; None only if the registry responds that there is none."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient()
    try:
        version = client.get_registered_model(name).aliases.get(alias)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return describe(client.get_model_version(name, version)) if version else None


def read_model(name: str) -> "RegisteredModel":
    """Return a registered model with its aliases; Refused if there is none of that name."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        return MlflowClient().get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise Refused(
            f"no model is registered as {name!r}; models are called DATASET-cnn: correct the name, "
            "or run train/weekly first"
        ) from error


def read_versions(name: str) -> "list[RegisteredVersion]":
    """Return all versions of a model."""
    from mlflow import MlflowClient

    client = MlflowClient()
    found: list[RegisteredVersion] = []
    token = None
    while True:
        page = client.search_model_versions(f"name = '{name}'", page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def read_version(name: str, number: int) -> "RegisteredVersion":
    """Return a version; Refused if there is none of that number, or it is half registered."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        version = MlflowClient().get_model_version(name, str(number))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        known = ", ".join(sorted((str(v.version) for v in read_versions(name)), key=int)) or "none"
        raise Refused(f"{name} has no version {number}; its versions are: {known}") from error
    # A run that died while it registered the version may have left tags out.
    missing = [tag for tag in _NEEDED_TAGS if tag not in version.tags]
    if missing or version.status != "READY":
        raise Refused(
            f"version {number} of {name} is only half registered (status {version.status}, without "
            f"{', '.join(missing) or 'no tag'}); nobody knows how it was judged: let train/weekly "
            "make another"
        )
    return version


def moves_of(version: "RegisteredVersion") -> list[Move]:
    """Return the moves that are recorded in the tags of a version, in order."""
    return [
        Move.model_validate_json(text)
        for key, text in sorted(version.tags.items())
        if key.startswith("history.")
    ]


def demand_challenger(model: "RegisteredModel", number: int) -> None:
    """Raise Refused unless that version awaits approval."""
    challenger = model.aliases.get(CHALLENGER)
    if challenger != str(number):
        waiting = f"version {challenger} does" if challenger else "none does"
        raise Refused(
            f"version {number} of {model.name} does not await approval, {waiting}: it was judged "
            "before, or a newer one took its place"
        )


def demand_same_artifacts(version: "RegisteredVersion") -> None:
    """Raise Refused if the files of a version are not those that were evaluated."""
    address = f"models:/{version.name}/{version.version}"
    found = digest_artifacts(address)
    expected = version.tags["artifact_sha256"]
    if found != expected:
        raise Refused(
            f"the artifacts of {address} have the digest {found[:12]}, not {expected[:12]} as when "
            "it was evaluated; somebody changed them: choose another version, or retrain"
        )


def digest_artifacts(address: str) -> str:
    """Return the SHA-256 over the names and contents of all files of a model in MLflow.

    Raises Refused if there are none, RegistryUnreachable if MLflow cannot deliver them now.
    """
    import mlflow.artifacts

    total = hashlib.sha256()
    cause = "no file is there"
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        try:
            with registry_errors(f"the artifacts of {address}"):
                root = Path(mlflow.artifacts.download_artifacts(address, dst_path=folder))
        except RegistryUnreachable:
            raise
        except (RegistryError, OSError) as error:
            cause = str(error)
        # MLflow adds registered_model_meta to a download; it is no file of the model.
        files = [path for path in root.rglob("*") if path.is_file()]
        files = [path for path in files if path.name != "registered_model_meta"]
        if not files:
            raise Refused(
                f"the artifacts of {address} cannot be read ({cause}); they are gone: roll back to "
                "a version that loads, or retrain"
            )
        for file in sorted(files):
            content = hashlib.sha256(file.read_bytes()).hexdigest()
            total.update(f"{file.relative_to(root).as_posix()} {content}\n".encode())
    return total.hexdigest()


def describe(version: "RegisteredVersion", snapshot: str | None = None) -> ModelVersion:
    """Return a registered version as the value passed between tasks.

    `snapshot` is for a version whose tags do not hold it yet.
    """
    return ModelVersion(
        name=version.name,
        version=str(version.version),
        run_id=version.run_id,
        model=f"models:/{version.name}/{version.version}",
        snapshot=snapshot or version.tags.get("snapshot", "not recorded"),
    )
