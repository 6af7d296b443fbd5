"""Read and write the MLflow model registry."""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from prefect import runtime, task

from mnist_cnn.promotion import Decision
from tasks.records import Candidate, ModelVersion
from tasks.storage import worth_another_try

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion as RegisteredVersion

CHAMPION = "champion"
CHALLENGER = "challenger"


class RegistryError(ConnectionError):
    """The registry did not answer a question that the decision depends on."""


class ChampionChanged(RuntimeError):
    """Somebody else moved the alias while this run was deciding."""


@task(retries=2, retry_delay_seconds=[2, 10], retry_condition_fn=worth_another_try)
def find_champion(name: str) -> ModelVersion | None:
    """Return the version with the alias `champion`; None only if the registry says there is none.

    Any other answer is a RegistryError: a registry that cannot be read is not an empty one.
    """
    return _find_champion(name)


def _find_champion(name: str) -> ModelVersion | None:
    from mlflow import MlflowClient  # noqa: PLC0415 - 2 s to import
    from mlflow.exceptions import MlflowException  # noqa: PLC0415

    client = MlflowClient()
    with _asking(f"the champion of {name}"):
        try:
            model = client.get_registered_model(name)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        version = model.aliases.get(CHAMPION)
        return _describe(client.get_model_version(name, version)) if version else None


@contextmanager
def _asking(what: str) -> Iterator[None]:
    from mlflow.exceptions import MlflowException  # noqa: PLC0415

    try:
        yield
    except MlflowException as error:
        raise RegistryError(
            f"{what} could not be read from {os.environ['MLFLOW_TRACKING_URI']} ({error}); "
            "nothing is promoted: repair the MLflow server and run again"
        ) from error


@task(retries=2, retry_delay_seconds=[2, 10], retry_condition_fn=worth_another_try)
def register_candidate(
    candidate: Candidate, decision: Decision, decision_record: str
) -> ModelVersion:
    """Register the candidate, promoted or not, with everything that explains it.

    A repeat finds the version that an earlier attempt registered.
    """
    import mlflow  # noqa: PLC0415
    from mlflow import MlflowClient  # noqa: PLC0415

    client = MlflowClient()
    with _asking(f"the versions of {candidate.name}"):
        known = client.search_model_versions(
            f"name = '{candidate.name}' and run_id = '{candidate.run_id}'"
        )
    if known:
        return _describe(known[0])
    flow_run = runtime.flow_run
    tags = {
        "snapshot": candidate.snapshot,
        "verdict": decision.verdict,
        "reason": decision.reason,
        "decision_record": decision_record,
        "compared_with": decision.champion or "no champion",
        "git_commit": _git_commit(),
        "prefect.flow_run_id": str(flow_run.id),
        "prefect.flow_run_url": str(flow_run.ui_url),
        "parameters": json.dumps(flow_run.parameters, default=lambda model: model.model_dump()),
    }
    version = mlflow.register_model(candidate.model, candidate.name, tags=tags)
    client.update_model_version(
        candidate.name, version.version, f"{decision.verdict}: {decision.reason}"
    )
    return _describe(version, candidate.snapshot)


@task(retries=2, retry_delay_seconds=[2, 10], retry_condition_fn=worth_another_try)
def set_champion(version: ModelVersion, replaces: ModelVersion | None) -> None:
    """Move the alias `champion` to `version`: one write, and the last of a run.

    Raises ChampionChanged if the champion is no longer `replaces`, the one that was beaten.
    """
    from mlflow import MlflowClient  # noqa: PLC0415

    present = _find_champion(version.name)
    if present == version:
        return
    if present != replaces:
        raise ChampionChanged(
            f"the champion of {version.name} is {present.model if present else 'none'}, but "
            f"{version.model} was compared with {replaces.model if replaces else 'none'}; nothing "
            "was promoted: run again to compare with the present champion"
        )
    MlflowClient().set_registered_model_alias(version.name, CHAMPION, version.version)


@task(retries=2, retry_delay_seconds=[2, 10], retry_condition_fn=worth_another_try)
def set_challenger(version: ModelVersion) -> None:
    """Point the alias `challenger` at a version that waits for a person's approval."""
    from mlflow import MlflowClient  # noqa: PLC0415

    MlflowClient().set_registered_model_alias(version.name, CHALLENGER, version.version)


def _describe(version: "RegisteredVersion", snapshot: str | None = None) -> ModelVersion:
    return ModelVersion(
        name=version.name,
        version=str(version.version),
        run_id=version.run_id,
        model=f"models:/{version.name}/{version.version}",
        snapshot=snapshot or version.tags["snapshot"],
    )


def _git_commit() -> str:
    """Return the commit that this code was checked out from, or `GIT_COMMIT` in an image."""
    if given := os.environ.get("GIT_COMMIT"):
        return given
    answer = subprocess.run(
        ["git", "rev-parse", "HEAD"],  # noqa: S607 - git is wherever PATH has it
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return answer.stdout.strip() or "not a git checkout"
