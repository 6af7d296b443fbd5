"""Retention: remove old checkpoints, leftovers and artifacts that nothing depends on.

The list of removable things is closed, so that everything else stays: checkpoints of runs that
ended, the leftovers of a gate check that was killed, and the artifacts of versions that were
judged, never promoted and have no alias. Snapshots, decisions, outcomes and the registry's records
stay.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Literal
from uuid import UUID

from prefect import get_run_logger
from prefect.artifacts import create_table_artifact
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound
from pydantic import BaseModel, Field

from tasks import keys
from tasks.registry.history import Move
from tasks.registry.versions import read_all_versions, remove_artifacts
from tasks.services.lock import exclusive
from tasks.services.mlflow import client, registry_errors
from tasks.services.s3 import Store
from tasks.services.step import step

if TYPE_CHECKING:
    from tasks.registry.versions import RegisteredVersion

REMOVED = "artifacts_removed"
"""Tag of a version whose artifacts were removed; its value is the date."""


class RetentionPolicy(BaseModel, frozen=True, extra="forbid"):
    """Days for which checkpoints and rejected artifacts are kept."""

    checkpoint_days: int = Field(
        14, ge=1, description="Days after a run's end in which it may still be resumed."
    )
    rejected_days: int = Field(
        90, ge=1, description="Days for which the artifacts of a version that lost are kept."
    )


class Removal(BaseModel, frozen=True):
    """A planned removal: objects under a prefix of the store, or the artifacts of a version."""

    kind: Literal["objects", "artifacts"]
    what: str
    """A prefix in the store, or `NAME/VERSION`."""
    why: str


@dataclass(frozen=True)
class Version:
    """A registered version, as far as retention depends on it."""

    name: str
    number: str
    source: str
    """The logged model that it points to."""
    created: datetime
    aliased: bool
    tags: Mapping[str, str]

    @property
    def needed(self) -> bool:
        """True if it has an alias, was ever promoted, or was never judged."""
        moves = [
            Move.model_validate_json(text)
            for key, text in self.tags.items()
            if key.startswith("history.")
        ]
        # The verdict "promote" is enough: the alias may not have moved yet.
        return (
            self.aliased
            or self.tags.get("verdict") not in {"keep", "needs-approval"}
            or any(move.action != "reject" for move in moves)
        )


def choose_removals(
    ended: Mapping[str, datetime],
    versions: Iterable[Version],
    policy: RetentionPolicy,
    now: datetime,
) -> list[Removal]:
    """Return the removals that are due under the policy, without carrying them out.

    `ended` maps each prefix that belongs to one run to the end of that run.
    """
    versions = list(versions)
    # Several versions may point to one logged model: it stays as long as one of them is needed.
    needed = {version.source for version in versions if version.needed}
    removals = [
        Removal(kind="objects", what=prefix, why=f"its run ended {end:%Y-%m-%d}")
        for prefix, end in sorted(ended.items())
        if now - end > timedelta(days=policy.checkpoint_days)
    ]
    for version in versions:
        old = now - version.created > timedelta(days=policy.rejected_days)
        if old and version.source not in needed and REMOVED not in version.tags:
            removals.append(
                Removal(
                    kind="artifacts",
                    what=f"{version.name}/{version.number}",
                    why=f"judged {version.tags['verdict']!r} on {version.created:%Y-%m-%d}, never "
                    "promoted, without alias",
                )
            )
    return removals


@step
@registry_errors("the versions that may be removed")
def plan_removals(policy: RetentionPolicy, store: str) -> list[Removal]:
    """Read store, flow runs and registry, and return the removals that are due."""
    versions = [_describe(version, aliased=aliased) for version, aliased in read_all_versions()]
    return choose_removals(_ended(Store(store)), versions, policy, datetime.now(UTC))


@step
@registry_errors("the artifacts to remove")
def remove(removals: list[Removal], store: str) -> list[Removal]:
    """Carry out planned removals, except for versions that are needed by now; return those done."""
    s3 = Store(store)
    logger = get_run_logger()
    removed: list[Removal] = []
    for removal in removals:
        if removal.kind == "objects":
            for name in s3.names(removal.what):
                s3.remove(name)
            removed.append(removal)
        elif _remove_artifacts(*removal.what.split("/")):
            removed.append(removal)
        else:
            logger.warning("%s stays: it is needed by now", removal.what)
    return removed


@step
def report_removals(removals: list[Removal], *, dry_run: bool) -> None:
    """Publish the list of removals, done or only planned."""
    logger = get_run_logger()
    verb = "would be removed" if dry_run else "removed"
    for removal in removals:
        logger.info("%s: %s (%s)", verb, removal.what, removal.why)
    create_table_artifact(
        [removal.model_dump() for removal in removals],
        key="retention",
        description=f"{len(removals) or 'Nothing'} {verb}",
    )


def _remove_artifacts(name: str, number: str) -> bool:
    """Remove the artifacts of a version; False if it is needed by now."""
    # Read again, under the lock: the version may have been promoted since the plan was made.
    with exclusive(name):
        version = client().get_model_version(name, number)
        if _describe(version, aliased=bool(version.aliases)).needed:
            return False
        # The tag first: a crash in between must not leave a version with half its artifacts
        # unmarked.
        client().set_model_version_tag(name, number, REMOVED, f"{datetime.now(UTC):%Y-%m-%d}")
        remove_artifacts(version)
    return True


def _describe(version: "RegisteredVersion", *, aliased: bool) -> Version:
    return Version(
        name=version.name,
        number=str(version.version),
        source=str(version.source),
        created=datetime.fromtimestamp(version.creation_timestamp / 1000, UTC),  # milliseconds
        aliased=aliased,
        tags=version.tags,
    )


def _ended(store: Store) -> dict[str, datetime]:
    """Return the prefixes of runs that have ended, with the time of the end.

    A run that is unknown to Prefect may belong to another server: its objects stay.
    """
    prefixes: set[str] = set()
    for name in [*store.names(keys.RUNS), *store.names(keys.GATE_CHECKS)]:
        run = name.split("/")[1]
        # All else under `runs/` is the run's record, which stays.
        folders = (keys.checkpoints(run), keys.gate_check(run))
        prefixes.update(folder for folder in folders if name.startswith(folder))
    ended: dict[str, datetime] = {}
    with get_client(sync_client=True) as prefect:
        for prefix in prefixes:
            try:
                found = prefect.read_flow_run(UUID(prefix.split("/")[1]))
            except (ObjectNotFound, ValueError):  # ValueError: the folder's name is no UUID
                continue
            if found.state and found.state.is_final() and found.end_time:
                ended[prefix] = found.end_time
    return ended
