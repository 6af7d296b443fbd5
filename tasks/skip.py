"""Skip a run that would only repeat an earlier one."""

from prefect import get_run_logger, runtime

from tasks.records import ModelVersion
from tasks.registry.fingerprint import Fingerprint
from tasks.registry.tags import VersionTags
from tasks.registry.versions import moves_of, read_versions
from tasks.services.mlflow import registry_errors
from tasks.services.step import step


@step
def find_repeat(champion: ModelVersion | None, ours: Fingerprint) -> str | None:
    """Return the reason to skip this run, as a sentence; None if it has something new to try.

    A run is skipped if its fingerprint is that of the champion, of a version that lost against the
    present champion, or of a version that was rolled back to it.
    """
    if champion is None:
        return None
    with registry_errors(f"the versions of {champion.name}"):
        versions = {str(version.version): version for version in read_versions(champion.name)}
    run = str(runtime.flow_run.id)
    if any(version.tags.get("prefect.flow_run_id") == run for version in versions.values()):
        return None  # an earlier attempt of this run registered a version, which must be judged
    today = f"today's champion, version {champion.version}"
    # Versions that somebody rolled back to the present champion: not to be trained again.
    undone = {
        move.from_version
        for move in moves_of(versions[champion.version])
        if move.action == "roll back"
    }
    for number in sorted(versions, key=int, reverse=True):
        tags = VersionTags.from_mlflow(versions[number].tags)
        if tags is None or tags.fingerprint is None:  # nothing to compare
            continue
        changes = ours.changes(Fingerprint.model_validate_json(tags.fingerprint))
        same = f"version {number} was made of the same snapshot, code, parameters and environment"
        if number == champion.version and changes:
            listed = ", ".join(changes)
            get_run_logger().info("changed since the champion was trained: %s", listed)
        elif changes:
            continue
        elif number == champion.version:
            return f"nothing is new: the champion, {same}"
        elif number in undone:
            return f"nothing is new: {same}, and was rolled back to {today}"
        elif tags.verdict != "promote" and tags.compared_with == champion.model:
            return f"nothing is new: {same}, and judged {tags.verdict!r} against {today}"
    return None
