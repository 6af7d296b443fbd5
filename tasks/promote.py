"""Register a candidate; promote it, submit it for approval, or roll back to it.

A flow run carries out each of its moves once. A resumed or retried run does not repeat a move, even
if somebody undid it since.
"""

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

from prefect import get_run_logger, runtime
from prefect.artifacts import create_table_artifact
from prefect.client.orchestration import get_client

from mnist_cnn.record import Record
from tasks.records import Candidate, ModelVersion
from tasks.registry.aliases import (
    append_description,
    champion_before,
    find_rollback,
    move_champion,
    moves_carried_out,
    record_move,
    settle_move,
    take_challenger_from,
    verify_history,
    was_done,
)
from tasks.registry.fingerprint import Fingerprint
from tasks.registry.history import (
    Account,
    own_move,
    plan_move,
)
from tasks.registry.tags import NO_CHAMPION, VersionTags
from tasks.registry.versions import (
    CHALLENGER,
    CHAMPION,
    PREVIOUS,
    Refused,
    demand_challenger,
    demand_same_artifacts,
    describe,
    digest_artifacts,
    find_version,
    moves_of,
    read_model,
    read_version,
    read_versions,
    register,
)
from tasks.runs.outcome import read_record, write_record
from tasks.services.lock import exclusive
from tasks.services.mlflow import client, registry_errors
from tasks.services.s3 import Store
from tasks.services.step import step

if TYPE_CHECKING:
    from mnist_cnn.evaluation import Evaluation
    from mnist_cnn.promotion import Decision

_ROLLBACK = "rollback"


class Rollback(Record):
    """Target of a rollback, stored for the flow run before any alias moves."""

    target: ModelVersion
    replaces: ModelVersion | None
    """The champion at that time."""


@step
def find_champion(name: str) -> ModelVersion | None:
    """Return the version with the alias `champion`; None only if the registry has none.

    Raises RegistryError if the registry cannot be read: that does not mean that it is empty.
    """
    with registry_errors(f"the champion of {name}"):
        return find_version(name, CHAMPION)


@step
def find_opponents(
    candidate: Candidate, store: str
) -> tuple[ModelVersion | None, ModelVersion | None]:
    """Return the champion to compare a candidate with, and the previous one for the model card.

    They are the present ones, unless an earlier attempt of this run registered the candidate and it
    was promoted or judged since: then they are the ones that it was compared with.
    """
    name = candidate.name
    with registry_errors(f"the champions of {name}"):
        versions = read_versions(name)
        registered = [v for v in versions if v.run_id == candidate.run_id]
        moves = moves_carried_out(name, versions, Store(store)) if registered else []
        targets = [move.to_version for move in moves]
        if registered and str(registered[0].version) in targets:
            # The candidate may be champion by now. Go back to the moves before its own.
            before = moves[: targets.index(str(registered[0].version))]
            known = {version.model: version for version in map(describe, versions)}
            _, tags = read_version(name, int(registered[0].version))
            champion = known.get(tags.compared_with)
            return champion, champion_before(champion, before, known)
        return find_version(name, CHAMPION), find_version(name, PREVIOUS)


@step
def register_candidate(
    candidate: Candidate,
    measured: "Evaluation",
    decision: "Decision",
    decision_record: str,
    made_of: Fingerprint | None = None,
) -> ModelVersion:
    """Register the candidate, promoted or not, tagged with its decision, data, code and run.

    A repeat returns the version that an earlier attempt registered. If the decision was made anew,
    because the champion had changed, its tags replace the former ones.
    """
    flow_run = runtime.flow_run
    tags = VersionTags(
        snapshot=candidate.snapshot,
        verdict=decision.verdict,
        reason=decision.reason,
        compared_with=decision.champion or NO_CHAMPION,
        accuracy=measured.accuracy,
        outcomes=measured.outcomes,
        artifact_sha256=digest_artifacts(candidate.model),
        git_commit=_git_commit(),
        flow_run_id=str(flow_run.id),
        flow_run_url=str(flow_run.ui_url),
        # Models such as the training configuration come from the flow as pydantic objects.
        parameters=json.dumps(flow_run.parameters, default=lambda model: model.model_dump()),
        fingerprint=made_of.model_dump_json() if made_of else None,
        decision_record=decision_record,
    ).to_mlflow()
    sentence = f"{decision.verdict}: {decision.reason}"
    with registry_errors(f"the versions of {candidate.name}"):
        known = [v for v in read_versions(candidate.name) if v.run_id == candidate.run_id]
        if known and known[0].tags.get("decision_record") == decision_record:
            append_description(candidate.name, known[0].version, sentence)
            return describe(known[0])
        if known:
            version = known[0]
            with exclusive(candidate.name):
                # The former decision may have been "needs-approval". Only such a version may be
                # approved, so the alias goes before the tags change.
                if decision.verdict != "needs-approval":
                    take_challenger_from(candidate.name, version.version)
                for key, value in tags.items():
                    client().set_model_version_tag(candidate.name, version.version, key, value)
        else:
            version = register(candidate.model, candidate.name, tags)
        client().update_model_version(candidate.name, version.version, sentence)
        return describe(version, candidate.snapshot)


@step
def link_version(version: ModelVersion, links: Mapping[str, str]) -> None:
    """Add links to the version's description, which MLflow's page renders as Markdown."""
    lines = "\n".join(f"- [{name}]({address})" for name, address in links.items())
    with registry_errors(f"the description of {version.model}"):
        append_description(version.name, version.version, lines)


@step
def set_champion(
    version: ModelVersion, replaces: ModelVersion | None, why: str, store: str
) -> bool:
    """Make `version` the champion in place of `replaces`, the one that it was compared with.

    Return False, and change nothing, if the champion is another by now: compare again.
    """
    run = runtime.flow_run
    account = Account(who=f"{run.flow_name}/{runtime.deployment.name or 'by hand'}", why=why)
    with registry_errors(f"the aliases of {version.name}"), exclusive(version.name):
        registered, _ = read_version(version.name, int(version.version))
        if was_done("promote", registered, Store(store)):
            return True
        present = find_version(version.name, CHAMPION)
        # `version` itself is champion if an earlier attempt died right after the alias moved.
        if present not in (version, replaces):
            return False
        move_champion("promote", version, present, account, Store(store))
        return True


@step
def set_challenger(version: ModelVersion) -> None:
    """Point the alias `challenger` at a version that awaits a person's approval.

    A version that was approved or rejected before this run was resumed is left alone.
    """
    with registry_errors(f"the aliases of {version.name}"), exclusive(version.name):
        registered, _ = read_version(version.name, int(version.version))
        if any(move.action in {"approve", "reject"} for move in moves_of(registered)):
            return
        client().set_registered_model_alias(version.name, CHALLENGER, version.version)


@step
def approve_challenger(name: str, number: int, account: Account, store: str) -> ModelVersion:
    """Make the challenger champion.

    Raises Refused if that version does not await approval, or if the champion or the version's
    artifacts have changed since it was evaluated.
    """
    with registry_errors(f"the aliases of {name}"), exclusive(name):
        model = read_model(name)
        version, tags = read_version(name, number)
        if was_done("approve", version, Store(store)):
            return describe(version)
        champion = find_version(name, CHAMPION)
        if model.aliases.get(CHAMPION) != str(number):
            demand_challenger(model, number)
            if tags.verdict != "needs-approval":
                raise Refused(
                    f"version {number} of {name} was judged {tags.verdict!r}, which nobody may "
                    "approve: its alias `challenger` was set by hand; look at its card, or run "
                    "train/weekly again"
                )
            present = champion.model if champion else NO_CHAMPION
            if tags.compared_with != present:
                raise Refused(
                    f"version {number} of {name} was compared with {tags.compared_with}, but now "
                    f"there is {present}; the approval is stale: run train/weekly again, which "
                    "compares with the present champion"
                )
            demand_same_artifacts(describe(version).model, tags.artifact_sha256)
        elif model.aliases.get(CHALLENGER) != str(number):
            raise Refused(f"version {number} of {name} is the champion already")
        move_champion("approve", describe(version), champion, account, Store(store))
        return describe(version)


@step
def reject_challenger(name: str, number: int, account: Account, store: str) -> ModelVersion:
    """Record the rejection of the challenger and remove its alias; the champion stays.

    Raises Refused if that version does not await approval.
    """
    with registry_errors(f"the aliases of {name}"), exclusive(name):
        version, _ = read_version(name, number)
        champion = find_version(name, CHAMPION)
        if was_done("reject", version, Store(store)):
            return describe(version)
        demand_challenger(read_model(name), number)
        before = champion.version if champion else None
        move = plan_move(
            Store(store), "reject", read_versions(name), version, champion=before, account=account
        )
        record_move(move, Store(store))
        settle_move(move)
        return describe(version)


@step
def fix_rollback(
    name: str, number: int | None, store: str
) -> tuple[ModelVersion, ModelVersion | None]:
    """Return the version to roll back to and the champion that it replaces, fixed for this run.

    A repeat returns the same two, wherever the aliases point by then. Raises Refused without a
    version to roll back to, or if `previous` has changed since the run was created.
    """
    fixed = read_record(Store(store), _ROLLBACK, Rollback) or _begun_rollback(name)
    if fixed is None:
        if number is None:
            _demand_no_move_since_request(name, store)
        target, champion = find_rollback(name, number, store)
        fixed = Rollback(target=target, replaces=champion)
        write_record(Store(store), _ROLLBACK, fixed)
    return fixed.target, fixed.replaces


@step
def roll_back_champion(
    target: ModelVersion, replaces: ModelVersion | None, account: Account, store: str
) -> None:
    """Make `target` champion again in place of `replaces`.

    Raises Refused if the champion is neither of the two.
    """
    with registry_errors(f"the aliases of {target.name}"), exclusive(target.name):
        version, _ = read_version(target.name, int(target.version))
        if was_done("roll back", version, Store(store)):
            return
        present = find_version(target.name, CHAMPION)
        if present not in (target, replaces):
            raise Refused(
                f"the champion of {target.name} became {present.model if present else 'none'} "
                "while this rollback was verified; nothing was moved: look at promote/history, and "
                "roll back again if you still want to"
            )
        move_champion("roll back", target, present, account, Store(store))


@step
def show_history(name: str, store: str) -> tuple[int, list[str]]:
    """Publish a table of all moves; return their number and the problems of the history."""
    logger = get_run_logger()
    history, done, problems = verify_history(name, Store(store))
    rows = [
        {
            "#": str(move.sequence),
            "when": f"{move.when:%Y-%m-%d %H:%M:%S} UTC",
            "what": move.action if carried_out else f"{move.action}: begun, not carried out",
            "from": move.from_version or "none",
            "to": move.to_version,
            "who": move.who,
            "run": f"[open]({move.run_url})",
            "digest": move.digest[:12],
            "why": move.why,  # the widest column comes last: a narrow page cuts it off
        }
        for move, carried_out in zip(history.moves, done, strict=True)
    ]
    for row in rows:
        logger.info("%(#)s  %(when)s  %(what)s  %(from)s  %(to)s  %(who)s  %(why)s", row)
    for move in history.lost:
        logger.warning("move %d was restored from the registry's tag", move.sequence)
    create_table_artifact(rows, key=f"history-{name}", description=f"Champions of {name}")
    return len(rows), problems


def _demand_no_move_since_request(name: str, store: str) -> None:
    """Raise Refused if the champion moved after this flow run was created.

    `previous` is then not the version that the person had in mind.
    """
    with get_client(sync_client=True) as prefect:
        requested = prefect.read_flow_run(UUID(str(runtime.flow_run.id))).created
    with registry_errors(f"the versions of {name}"):
        moves = moves_carried_out(name, read_versions(name), Store(store))
    later = [
        move for move in moves if move.action != "reject" and requested and move.when > requested
    ]
    if later:
        raise Refused(
            f"version {later[-1].to_version} of {name} became champion at "
            f"{later[-1].when:%Y-%m-%d %H:%M:%S} UTC, after this rollback was asked for; nothing "
            "was moved: look at promote/history, and name the version to roll back to"
        )


def _begun_rollback(name: str) -> Rollback | None:
    """Return the rollback of this flow run as the history has it, for a run without a record.

    Earlier releases kept no such record, and their runs can still be retried.
    """
    with registry_errors(f"the versions of {name}"):
        versions = {str(version.version): version for version in read_versions(name)}
    own = own_move(versions.values(), "roll back")
    if own is None:
        return None
    before = versions.get(own.from_version) if own.from_version else None
    replaces = describe(before) if before else None
    return Rollback(target=describe(versions[own.to_version]), replaces=replaces)


def _git_commit() -> str:
    """Return the commit of this checkout, or `GIT_COMMIT` in an image.

    It ends in `-dirty` if tracked files were edited since.
    """
    if given := os.environ.get("GIT_COMMIT"):
        return given
    described = subprocess.run(
        # --exclude=* leaves out tags: the hash alone.
        ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],  # noqa: S607 - git is wherever PATH has it
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() or "not a git checkout"
