"""Read access to the MLflow model registry, with errors that name the cause and the remedy."""

import hashlib
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.records import ModelVersion
from tasks.registry.history import Move
from tasks.registry.tags import VersionTags, missing_tags
from tasks.services.mlflow import (
    RegistryError,
    RegistryUnreachable,
    client,
    none_if_missing,
    registry_errors,
)

if TYPE_CHECKING:
    import mlflow.entities.model_registry

    RegisteredModel = mlflow.entities.model_registry.RegisteredModel
    RegisteredVersion = mlflow.entities.model_registry.ModelVersion

CHAMPION = "champion"
PREVIOUS = "previous"
CHALLENGER = "challenger"


class Refused(ValueError):
    """A person's request must not be carried out; the message gives the reason and the remedy."""


def find_version(name: str, alias: str) -> ModelVersion | None:
    """Return the version with an alias; None only if the registry responds that there is none."""
    model = none_if_missing(lambda: client().get_registered_model(name))
    version = model.aliases.get(alias) if model else None
    return describe(client().get_model_version(name, version)) if version else None


def read_model(name: str) -> "RegisteredModel":
    """Return a registered model with its aliases; Refused if there is none of that name."""
    model = none_if_missing(lambda: client().get_registered_model(name))
    if model is None:
        raise Refused(
            f"no model is registered as {name!r}; models are called DATASET-cnn: correct the name, "
            "or run train/weekly first"
        )
    return model


def read_versions(name: str) -> "list[RegisteredVersion]":
    """Return all versions of a model."""
    return list(_every(partial(client().search_model_versions, f"name = '{name}'")))


def read_all_versions() -> "Iterator[tuple[RegisteredVersion, bool]]":
    """Yield all versions of all models, each with whether it has an alias.

    A search for versions leaves their aliases out, so these come from the models.
    """
    aliased = {
        (model.name, str(number))
        for model in _every(client().search_registered_models)
        for number in model.aliases.values()
    }
    for version in _every(client().search_model_versions):
        yield version, (version.name, str(version.version)) in aliased


def _every(search: Callable[..., Any]) -> Iterator[Any]:
    """Yield the results of a paged search of MLflow, page after page."""
    token = None
    while True:
        page = search(page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def read_version(name: str, number: int) -> tuple["RegisteredVersion", VersionTags]:
    """Return a version and its tags; Refused if there is none, or it is half registered."""
    version = none_if_missing(lambda: client().get_model_version(name, str(number)))
    if version is None:
        known = ", ".join(sorted((str(v.version) for v in read_versions(name)), key=int)) or "none"
        raise Refused(f"{name} has no version {number}; its versions are: {known}")
    # A run that died while it registered the version may have left tags out.
    tags = VersionTags.from_mlflow(version.tags)
    if tags is None or version.status != "READY":
        missing = ", ".join(missing_tags(version.tags)) or "no tag"
        raise Refused(
            f"version {number} of {name} is only half registered (status {version.status}, without "
            f"{missing}); nobody knows how it was judged: let train/weekly "
            "make another"
        )
    return version, tags


def register(model: str, name: str, tags: dict[str, str]) -> "RegisteredVersion":
    """Register a logged model as the next version of a registered model."""
    import mlflow

    return mlflow.register_model(model, name, tags=tags)


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


def demand_same_artifacts(address: str, digest: str) -> None:
    """Raise Refused if the files of a model are not those that were evaluated."""
    found = digest_artifacts(address)
    if found != digest:
        raise Refused(
            f"the artifacts of {address} have the digest {found[:12]}, not {digest[:12]} as when "
            "it was evaluated; somebody changed them: choose another version, or retrain"
        )


def digest_artifacts(address: str) -> str:
    """Return the SHA-256 over the names and contents of all files of a model in MLflow.

    Raises Refused if there are none, RegistryUnreachable if MLflow cannot deliver them now.
    """
    total = hashlib.sha256()
    cause = "no file is there"
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        try:
            with registry_errors(f"the artifacts of {address}"):
                root = download(address, folder)
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


def download(address: str, folder: str) -> Path:
    """Download the files of a model in MLflow under a folder; return where they are."""
    import mlflow.artifacts

    return Path(mlflow.artifacts.download_artifacts(address, dst_path=folder))


def remove_artifacts(version: "RegisteredVersion") -> None:
    """Remove all files of a version; the version itself stays."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    address = client().get_model_version_download_uri(version.name, version.version)
    repository: Any = get_artifact_repository(address)  # its methods have no types
    repository.delete_artifacts()


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
