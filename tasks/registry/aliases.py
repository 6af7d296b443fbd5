"""The aliases of a registered model, and the only code that moves `champion` and `previous`.

Three aliases: `champion`, `previous` (what the champion replaced) and `challenger` (what waits for
a person). MLflow cannot compare and set, so whoever moves them holds Prefect's global concurrency
limit `promote-NAME`. The order of writes is what makes a crash harmless: the move is recorded, then
`previous` is set, then `champion` moves in one write. Whatever comes after only tidies up.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from prefect import runtime

from tasks.records import ModelVersion
from tasks.registry.history import (
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
from tasks.registry.versions import (
    CHALLENGER,
    CHAMPION,
    PREVIOUS,
    Refused,
    RegistryError,
    demand_same_artifacts,
    describe,
    find_version,
    moves_of,
    read_model,
    read_version,
    read_versions,
    registry_errors,
)
from tasks.services.events import emit
from tasks.services.lock import exclusive
from tasks.services.s3 import Store

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion as RegisteredVersion

_EVENTS: dict[Action, str] = {
    "promote": "model.promoted",
    "approve": "model.promoted",
    "roll back": "model.rolled-back",
}


def find_rollback(
    name: str, number: int | None, store: str
) -> tuple[ModelVersion, ModelVersion | None]:
    """Return the version to roll back to, `previous` if none is named, and today's champion.

    Raises Refused for a version that is unknown, half registered, or was never champion.
    """
    with registry_errors(f"the versions of {name}"):
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
        moves = moves_carried_out(name, read_versions(name), Store(store))
        if not any(move.action != "reject" and move.to_version == chosen for move in moves):
            raise Refused(
                f"version {chosen} of {name} was never champion (it was judged "
                f"{version.tags['verdict']!r}: {version.tags.get('reason', 'no reason given')}); "
                "name one that was (promote/history lists them), or retrain"
            )
        demand_same_artifacts(version)
        return describe(version), find_version(name, CHAMPION)


def verify_history(name: str, store: Store) -> tuple[History, list[bool], list[str]]:
    """Read the history of a model; return it, whether each move was carried out, and what is wrong.

    Objects that are lost are restored from the registry's tags, and a last move that is seen to be
    carried out is confirmed. Raises Refused if there is no such model.
    """
    with registry_errors(f"the history of {name}"), exclusive(name):  # no move is seen half done
        champion = read_model(name).aliases.get(CHAMPION)
        history = read_history(store, name, read_versions(name), restore=True)
        moved = [move for move in history.moves if move.action != "reject"]
        for move in moved[-1:]:
            if move.to_version == champion and move.digest not in history.confirmed:
                confirm(move, store)
    done, unexplained = trace(history.moves, champion, history.confirmed)
    return history, done, [*history.problems, *unexplained]


def move_champion(
    action: Action,
    version: ModelVersion,
    present: ModelVersion | None,
    account: Account,
    store: Store,
) -> None:
    """Record, set `previous`, move `champion`, tidy up. The caller holds `exclusive`.

    Each step may be the last one of a run that dies: a repeat finds what was done and goes on.
    """
    from mlflow import MlflowClient

    client, name = MlflowClient(), version.name
    versions = read_versions(name)
    target = next(v for v in versions if str(v.version) == version.version)
    if present != version:
        before = present.version if present else None
        move = plan_move(store, action, versions, target, champion=before, account=account)
        record_move(move, store)
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
        settle_move(move)
        if move.run == str(runtime.flow_run.id):
            _emit(move, target, store)


def was_done(action: Action, version: "RegisteredVersion", store: Store) -> bool:
    """Tell whether this flow run has done that to a version, and tidy up after it.

    The caller holds `exclusive`.
    """
    own = own_move([version], action)
    if own is None:
        return False
    if action == "reject":
        record_move(own, store)
    elif own not in moves_carried_out(own.model, read_versions(own.model), store):
        return False
    else:
        confirm(own, store)
    settle_move(own)
    _emit(own, version, store)
    return True


def moves_carried_out(name: str, versions: "list[RegisteredVersion]", store: Store) -> list[Move]:
    """Return the moves of a model that were carried out, in order."""
    champion = read_model(name).aliases.get(CHAMPION)
    history = read_history(store, name, versions, restore=False)
    done, _ = trace(history.moves, champion, history.confirmed)
    return [move for move, carried_out in zip(history.moves, done, strict=True) if carried_out]


def champion_before(
    champion: ModelVersion | None, moves: list[Move], known: Mapping[str, ModelVersion]
) -> ModelVersion | None:
    """Return what a champion replaced when it last became that, of the versions that are known."""
    for move in reversed(moves):
        if champion and move.action != "reject" and move.to_version == champion.version:
            return known.get(f"models:/{move.model}/{move.from_version}")
    return None


def record_move(move: Move, store: Store) -> None:
    """Write a move to its tag first: a repeat finds it there, and its object can be restored."""
    from mlflow import MlflowClient

    MlflowClient().set_model_version_tag(move.model, move.to_version, move.tag, move.content)
    store.put(move.name, move.content.encode())


def settle_move(move: Move) -> None:
    """Say in the version's description what was done, and take the alias `challenger` from it."""
    done = {"promote": "promoted", "approve": "approved", "reject": "rejected"}
    sentence = f"{done.get(move.action, 'rolled back to')} by {move.who}: {move.why}"
    append_description(
        move.model, move.to_version, f"Move {move.sequence}: {sentence} ({move.run_url})"
    )
    take_challenger_from(move.model, move.to_version)


def take_challenger_from(name: str, number: str) -> None:
    """Take the alias `challenger` from a version, if it has it. The caller holds `exclusive`."""
    from mlflow import MlflowClient

    if read_model(name).aliases.get(CHALLENGER) == str(number):
        MlflowClient().delete_registered_model_alias(name, CHALLENGER)


def _emit(move: Move, target: "RegisteredVersion", store: Store) -> None:
    """Emit the event of a move that was carried out."""
    if move.action in _EVENTS:
        emit(
            _EVENTS[move.action],
            f"model.{move.model}",
            move.digest,
            {
                "model": move.model,
                "from": move.from_version,
                "to": move.to_version,
                "artifact_sha256": target.tags["artifact_sha256"],
                "snapshot": target.tags["snapshot"],
                "store": store.address,
            },
        )


def append_description(name: str, number: str, text: str) -> None:
    """Add a paragraph to the description of a version, unless it is there."""
    from mlflow import MlflowClient

    description = MlflowClient().get_model_version(name, number).description or ""
    if text not in description:
        MlflowClient().update_model_version(name, number, f"{description}\n\n{text}".strip())
