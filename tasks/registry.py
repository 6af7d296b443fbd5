"""Register candidates and move the aliases of the MLflow model registry.

Three aliases: `champion`, `previous` (what the champion replaced) and `challenger` (what waits for
a person). MLflow cannot compare and set, so whoever moves them holds Prefect's global concurrency
limit `promote-NAME`. The order of writes is what makes a crash harmless: the move is recorded, then
`previous` is set, then `champion` moves in one write. Whatever comes after only tidies up.

A flow run moves each thing once. What it has carried out it does not do again when it is resumed or
retried, even if somebody undid it since.
"""

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from prefect import get_run_logger, runtime
from prefect.artifacts import create_table_artifact
from pydantic import BaseModel

from tasks.events import emit_move
from tasks.exclusion import exclusive
from tasks.fingerprint import TAG as FINGERPRINT
from tasks.fingerprint import Fingerprint
from tasks.history import (
    Account,
    Action,
    History,
    Move,
    confirm,
    own_move,
    plan_move,
    read_history,
    trace,
)
from tasks.outcome import read_record, write_record
from tasks.records import Candidate, ModelVersion
from tasks.step import step
from tasks.storage import Store
from tasks.versions import (
    CHALLENGER,
    CHAMPION,
    PREVIOUS,
    Refused,
    RegistryError,
    asking,
    demand_challenger,
    demand_same_artifacts,
    describe,
    digest_artifacts,
    find_version,
    moves_of,
    read_model,
    read_version,
    read_versions,
)

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion as RegisteredVersion

    from mnist_cnn.evaluation import Evaluation
    from mnist_cnn.promotion import Decision

_ROLLBACK = "rollback"


class Rollback(BaseModel, frozen=True):
    """What a rollback was asked for, fixed for the flow run before anything moves."""

    format: Literal[1] = 1
    target: ModelVersion
    replaces: ModelVersion | None
    """The champion at that time."""


@step
def find_champion(name: str) -> ModelVersion | None:
    """Return the version with the alias `champion`; None only if the registry says there is none.

    Any other answer is a RegistryError: a registry that cannot be read is not an empty one.
    """
    with asking(f"the champion of {name}"):
        return find_version(name, CHAMPION)


@step
def find_opponents(
    candidate: Candidate, store: str
) -> tuple[ModelVersion | None, ModelVersion | None]:
    """Return the champion to compare a candidate with, and the one before, shown in the card.

    They are today's, unless an earlier attempt of this run registered the candidate and it was
    promoted or judged since: then they are those that it was compared with.
    """
    name = candidate.name
    with asking(f"the champions of {name}"):
        versions = read_versions(name)
        registered = [v for v in versions if v.run_id == candidate.run_id]
        moves = _carried_out(name, versions, Store(store)) if registered else []
        targets = [move.to_version for move in moves]
        if registered and str(registered[0].version) in targets:
            before = moves[: targets.index(str(registered[0].version))]
            known = {version.model: version for version in map(describe, versions)}
            champion = known.get(registered[0].tags["compared_with"])
            return champion, _champion_before(champion, before, known)
        return find_version(name, CHAMPION), find_version(name, PREVIOUS)


@step
def register_candidate(
    candidate: Candidate,
    measured: "Evaluation",
    decision: "Decision",
    decision_record: str,
    made_of: Fingerprint | None = None,
) -> ModelVersion:
    """Register the candidate, promoted or not, with everything that explains it.

    A repeat finds the version that an earlier attempt registered, and a decision that was made
    anew, because the champion had changed, takes the place of the former.
    """
    import mlflow  # noqa: PLC0415 - 2 s to import
    from mlflow import MlflowClient  # noqa: PLC0415

    client = MlflowClient()
    flow_run = runtime.flow_run
    tags = {
        "snapshot": candidate.snapshot,
        "verdict": decision.verdict,
        "reason": decision.reason,
        "compared_with": decision.champion or "no champion",
        "accuracy": str(measured.accuracy),
        "outcomes": measured.outcomes,
        "artifact_sha256": digest_artifacts(candidate.model),
        "git_commit": _git_commit(),
        "prefect.flow_run_id": str(flow_run.id),
        "prefect.flow_run_url": str(flow_run.ui_url),
        "parameters": json.dumps(flow_run.parameters, default=lambda model: model.model_dump()),
    }
    if made_of:
        tags[FINGERPRINT] = made_of.model_dump_json()
    tags["decision_record"] = decision_record  # last: a repeat takes it for all of them
    sentence = f"{decision.verdict}: {decision.reason}"
    with asking(f"the versions of {candidate.name}"):
        known = [v for v in read_versions(candidate.name) if v.run_id == candidate.run_id]
        if known and known[0].tags.get("decision_record") == decision_record:
            _append(candidate.name, known[0].version, sentence)
            return describe(known[0])
        if known:
            for key, value in tags.items():
                client.set_model_version_tag(candidate.name, known[0].version, key, value)
            version = known[0]
        else:
            version = mlflow.register_model(candidate.model, candidate.name, tags=tags)
        client.update_model_version(candidate.name, version.version, sentence)
        return describe(version, candidate.snapshot)


@step
def link_version(version: ModelVersion, links: Mapping[str, str]) -> None:
    """Add links to the version's description, from where a browser opens them."""
    lines = "\n".join(f"- [{name}]({address})" for name, address in links.items())
    with asking(f"the description of {version.model}"):
        _append(version.name, version.version, lines)


@step
def set_champion(
    version: ModelVersion, replaces: ModelVersion | None, why: str, store: str
) -> bool:
    """Make `version` the champion in place of `replaces`, the one that it was compared with.

    False if the champion is another by now: then nothing is done, and the comparison is due again.
    """
    run = runtime.flow_run
    account = Account(who=f"{run.flow_name}/{runtime.deployment.name or 'by hand'}", why=why)
    with asking(f"the aliases of {version.name}"), exclusive(version.name):
        if _did("promote", read_version(version.name, int(version.version)), Store(store)):
            return True
        present = find_version(version.name, CHAMPION)
        if present not in (version, replaces):
            return False
        _move_champion("promote", version, present, account, Store(store))
        return True


@step
def set_challenger(version: ModelVersion) -> None:
    """Point the alias `challenger` at a version that waits for a person's approval.

    One that was judged already, before this run was resumed, waits no more.
    """
    from mlflow import MlflowClient  # noqa: PLC0415

    with asking(f"the aliases of {version.name}"), exclusive(version.name):
        moves = moves_of(read_version(version.name, int(version.version)))
        if any(move.action in {"approve", "reject"} for move in moves):
            return
        MlflowClient().set_registered_model_alias(version.name, CHALLENGER, version.version)


@step
def approve_challenger(name: str, number: int, account: Account, store: str) -> ModelVersion:
    """Make the challenger champion, if nothing has changed since it was evaluated, else Refused."""
    with asking(f"the aliases of {name}"), exclusive(name):
        model, version = read_model(name), read_version(name, number)
        if _did("approve", version, Store(store)):
            return describe(version)
        champion = find_version(name, CHAMPION)
        if model.aliases.get(CHAMPION) != str(number):
            demand_challenger(model, number)
            compared = version.tags["compared_with"]
            present = champion.model if champion else "no champion"
            if compared != present:
                raise Refused(
                    f"version {number} of {name} was compared with {compared}, but now there is "
                    f"{present}; the approval is stale: run train/weekly again, which compares "
                    "with the present champion"
                )
            demand_same_artifacts(version)
        elif model.aliases.get(CHALLENGER) != str(number):
            raise Refused(f"version {number} of {name} is the champion already")
        _move_champion("approve", describe(version), champion, account, Store(store))
        return describe(version)


@step
def reject_challenger(name: str, number: int, account: Account, store: str) -> ModelVersion:
    """Record that the challenger was rejected, and take its alias away; no champion moves."""
    with asking(f"the aliases of {name}"), exclusive(name):
        version, champion = read_version(name, number), find_version(name, CHAMPION)
        if _did("reject", version, Store(store)):
            return describe(version)
        demand_challenger(read_model(name), number)
        before = champion.version if champion else None
        move = plan_move(
            Store(store), "reject", read_versions(name), version, champion=before, account=account
        )
        _record(move, Store(store))
        _settle(move)
        return describe(version)


@step
def fix_rollback(
    name: str, number: int | None, store: str
) -> tuple[ModelVersion, ModelVersion | None]:
    """Return the version to roll back to and the champion that it replaces, fixed for this run.

    A repeat returns the same two, whatever the aliases say by then.
    """
    fixed = read_record(Store(store), _ROLLBACK, Rollback) or _begun_rollback(name)
    if fixed is None:
        target, champion = find_rollback(name, number, store)
        fixed = Rollback(target=target, replaces=champion)
        write_record(Store(store), _ROLLBACK, fixed)
    return fixed.target, fixed.replaces


def find_rollback(
    name: str, number: int | None, store: str
) -> tuple[ModelVersion, ModelVersion | None]:
    """Return the version to roll back to, `previous` if none is named, and today's champion.

    Raises Refused for a version that is unknown, half registered, or was never champion.
    """
    with asking(f"the versions of {name}"):
        aliases = read_model(name).aliases
        chosen = str(number) if number else aliases.get(PREVIOUS)
        if chosen is None:
            raise Refused(
                f"{name} has no previous champion to roll back to; name a version that was "
                "promoted once (promote/history lists them), or retrain"
            )
        if chosen == aliases.get(CHAMPION):
            raise Refused(
                f"version {chosen} of {name} is the champion already; name another version that "
                "was promoted once (promote/history lists them)"
            )
        version = read_version(name, int(chosen))
        moves = _carried_out(name, read_versions(name), Store(store))
        if not any(move.action != "reject" and move.to_version == chosen for move in moves):
            raise Refused(
                f"version {chosen} of {name} was never champion (it was judged "
                f"{version.tags['verdict']!r}: {version.tags.get('reason', 'no reason given')}); "
                "name one that was (promote/history lists them), or retrain"
            )
        demand_same_artifacts(version)
        return describe(version), find_version(name, CHAMPION)


@step
def roll_back_champion(
    target: ModelVersion, replaces: ModelVersion | None, account: Account, store: str
) -> None:
    """Make `target` champion again in place of `replaces`; Refused if that is not champion now."""
    with asking(f"the aliases of {target.name}"), exclusive(target.name):
        if _did("roll back", read_version(target.name, int(target.version)), Store(store)):
            return
        present = find_version(target.name, CHAMPION)
        if present not in (target, replaces):
            raise Refused(
                f"the champion of {target.name} became {present.model if present else 'none'} "
                "while this rollback was verified; nothing was moved: look at promote/history, and "
                "roll back again if you still want to"
            )
        _move_champion("roll back", target, present, account, Store(store))


@step
def show_history(name: str, store: str) -> tuple[int, list[str]]:
    """Publish a table of all moves; return their number and what is wrong with the history."""
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
            "why": move.why,  # last: a page may be too narrow for it
        }
        for move, carried_out in zip(history.moves, done, strict=True)
    ]
    for row in rows:
        logger.info("%(#)s  %(when)s  %(what)s  %(from)s  %(to)s  %(who)s  %(why)s", row)
    for move in history.lost:
        logger.warning("move %d was restored from the registry's tag", move.sequence)
    create_table_artifact(rows, key=f"history-{name}", description=f"Champions of {name}")
    return len(rows), problems


def verify_history(name: str, store: Store) -> tuple[History, list[bool], list[str]]:
    """Read the history of a model; return it, whether each move was carried out, and what is wrong.

    Objects that are lost are restored from the registry's tags, and a last move that is seen to be
    carried out is confirmed. Raises Refused if there is no such model.
    """
    with asking(f"the history of {name}"), exclusive(name):  # no move is seen half done
        champion = read_model(name).aliases.get(CHAMPION)
        history = read_history(store, name, read_versions(name), restore=True)
        moved = [move for move in history.moves if move.action != "reject"]
        for move in moved[-1:]:
            if move.to_version == champion and move.digest not in history.confirmed:
                confirm(move, store)
    done, unexplained = trace(history.moves, champion, history.confirmed)
    return history, done, [*history.problems, *unexplained]


def _move_champion(
    action: Action,
    version: ModelVersion,
    present: ModelVersion | None,
    account: Account,
    store: Store,
) -> None:
    """Record, set `previous`, move `champion`, tidy up. The caller holds `exclusive`.

    Each step may be the last one of a run that dies: a repeat finds what was done and goes on.
    """
    from mlflow import MlflowClient  # noqa: PLC0415

    client, name = MlflowClient(), version.name
    versions = read_versions(name)
    target = next(v for v in versions if str(v.version) == version.version)
    if present != version:
        before = present.version if present else None
        move = plan_move(store, action, versions, target, champion=before, account=account)
        _record(move, store)
        if present:
            client.set_registered_model_alias(name, PREVIOUS, present.version)
        if find_version(name, CHAMPION) != present:
            raise RegistryError(
                f"the champion of {name} changed although this run held its concurrency limit; "
                "nothing was promoted: somebody moves aliases by other means, find out who"
            )
        client.set_registered_model_alias(name, CHAMPION, version.version)
        confirm(move, store)
        target = read_version(name, int(version.version))
    for move in moves_of(target):
        _settle(move)
        if move.run == str(runtime.flow_run.id):
            _emit(move, target, store)


def _did(action: Action, version: "RegisteredVersion", store: Store) -> bool:
    """Tell whether this flow run has done that to a version, and tidy up after it.

    The caller holds `exclusive`.
    """
    own = own_move([version], action)
    if own is None:
        return False
    if action == "reject":
        _record(own, store)
    elif own not in _carried_out(own.model, read_versions(own.model), store):
        return False
    else:
        confirm(own, store)
    _settle(own)
    _emit(own, version, store)
    return True


def _carried_out(name: str, versions: "list[RegisteredVersion]", store: Store) -> list[Move]:
    """Return the moves of a model that were carried out, in order."""
    champion = read_model(name).aliases.get(CHAMPION)
    history = read_history(store, name, versions, restore=False)
    done, _ = trace(history.moves, champion, history.confirmed)
    return [move for move, carried_out in zip(history.moves, done, strict=True) if carried_out]


def _champion_before(
    champion: ModelVersion | None, moves: list[Move], known: Mapping[str, ModelVersion]
) -> ModelVersion | None:
    """Return what a champion replaced when it last became that, of the versions that are known."""
    for move in reversed(moves):
        if champion and move.action != "reject" and move.to_version == champion.version:
            return known.get(f"models:/{move.model}/{move.from_version}")
    return None


def _begun_rollback(name: str) -> Rollback | None:
    """Return the rollback that this flow run has in the history, if it was begun without a record.

    So did the code before there were records, whose runs can still be retried.
    """
    with asking(f"the versions of {name}"):
        versions = {str(version.version): version for version in read_versions(name)}
    own = own_move(versions.values(), "roll back")
    if own is None:
        return None
    before = versions.get(own.from_version) if own.from_version else None
    replaces = describe(before) if before else None
    return Rollback(target=describe(versions[own.to_version]), replaces=replaces)


def _record(move: Move, store: Store) -> None:
    """Write a move to its tag first: a repeat finds it there, and its object can be restored."""
    from mlflow import MlflowClient  # noqa: PLC0415

    MlflowClient().set_model_version_tag(move.model, move.to_version, move.tag, move.content)
    store.put(move.name, move.content.encode())


def _settle(move: Move) -> None:
    """Say in the version's description what was done, and take the alias `challenger` from it."""
    from mlflow import MlflowClient  # noqa: PLC0415

    done = {"promote": "promoted", "approve": "approved", "reject": "rejected"}
    sentence = f"{done.get(move.action, 'rolled back to')} by {move.who}: {move.why}"
    _append(move.model, move.to_version, f"Move {move.sequence}: {sentence} ({move.run_url})")
    if read_model(move.model).aliases.get(CHALLENGER) == move.to_version:
        MlflowClient().delete_registered_model_alias(move.model, CHALLENGER)


def _emit(move: Move, target: "RegisteredVersion", store: Store) -> None:
    """Emit the event of a move that was carried out."""
    emit_move(move, target.tags["artifact_sha256"], target.tags["snapshot"], store.address)


def _append(name: str, number: str, text: str) -> None:
    """Add a paragraph to the description of a version, unless it is there."""
    from mlflow import MlflowClient  # noqa: PLC0415

    description = MlflowClient().get_model_version(name, number).description or ""
    if text not in description:
        MlflowClient().update_model_version(name, number, f"{description}\n\n{text}".strip())


def _git_commit() -> str:
    """Return the commit that this code was checked out from, or `GIT_COMMIT` in an image.

    It ends in `-dirty` if files were edited since.
    """
    if given := os.environ.get("GIT_COMMIT"):
        return given
    answer = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],  # noqa: S607 - git is wherever PATH has it
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return answer.stdout.strip() or "not a git checkout"
