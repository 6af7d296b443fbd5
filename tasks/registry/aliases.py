"""The aliases of a registered model, and the only code that moves `champion` and `previous`.

Three aliases: `champion`, `previous` (the version that the champion replaced) and `challenger` (the
version that awaits approval). MLflow has no compare-and-set, so a run that moves them holds
Prefect's global concurrency limit `promote-NAME`. The order of writes makes a crash harmless: the
move is recorded, then `previous` is set, then `champion` moves in one write. All later writes only
tidy up.
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
    demand_same_artifacts,
    describe,
    find_version,
    moves_of,
    read_model,
    read_version,
    read_versions,
)
from tasks.services.events import emit
from tasks.services.lock import exclusive
from tasks.services.mlflow import RegistryError, client, registry_errors
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
    """Return the version to roll back to, by default `previous`, and the present champion.

    Raises Refused for a version that is unknown, half registered, the champion already, was never
    champion, or whose artifacts were changed.
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
        version, tags = read_version(name, int(chosen))
        # A version that never passed a decision must not become champion by way of a rollback.
        moves = moves_carried_out(name, read_versions(name), Store(store))
        if not any(move.action != "reject" and move.to_version == chosen for move in moves):
            raise Refused(
                f"version {chosen} of {name} was never champion (it was judged {tags.verdict!r}: "
                f"{tags.reason}); name one that was (promote/history lists them), or retrain"
            )
        demand_same_artifacts(describe(version).model, tags.artifact_sha256)
        return describe(version), find_version(name, CHAMPION)


def verify_history(name: str, store: Store) -> tuple[History, list[bool], list[str]]:
    """Verify the history of a model; return it, a flag for each move, and the problems.

    A flag is true if the move was carried out; a problem is a sentence. Lost objects are restored
    from the registry's tags, and a last move is confirmed if the champion shows that it was carried
    out. Raises Refused if there is no such model.
    """
    with registry_errors(f"the history of {name}"), exclusive(name):  # no move is seen half done
        champion = read_model(name).aliases.get(CHAMPION)
        history = read_history(store, name, read_versions(name), restore=True)
        # A run may have died between the alias and the confirmation. While the champion still shows
        # that the last move was carried out, this is put on record.
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
    """Record a move, set `previous`, move `champion`, tidy up. The caller holds `exclusive`.

    A run may die after any step: a repeat finds the finished steps and continues with the next.
    Raises RegistryError if the champion is changed meanwhile by other means.
    """
    name = version.name
    versions = read_versions(name)
    target = next(v for v in versions if str(v.version) == version.version)
    # If it is champion already, an earlier attempt moved the alias: only tidying up is left.
    if present != version:
        before = present.version if present else None
        move = plan_move(store, action, versions, target, champion=before, account=account)
        record_move(move, store)
        if present:
            client().set_registered_model_alias(name, PREVIOUS, present.version)
        # The limit binds our runs only. This finds moves by others, except in the last moment.
        if find_version(name, CHAMPION) != present:
            raise RegistryError(
                f"the champion of {name} changed although this run held its concurrency limit; "
                "nothing was promoted: somebody moves aliases by other means, find out who"
            )
        client().set_registered_model_alias(name, CHAMPION, version.version)
        confirm(move, store)
        target, _ = read_version(name, int(version.version))  # with the tag of the new move
    for move in moves_of(target):
        settle_move(move)
        if move.run == str(runtime.flow_run.id):
            _emit(move, store)


def was_done(action: Action, version: "RegisteredVersion", store: Store) -> bool:
    """Return True if this flow run has carried out that action on a version, and tidy up after it.

    The caller holds `exclusive`.
    """
    own = own_move([version], action)
    if own is None:
        return False
    if action == "reject":  # it moves no champion: with its tag it is carried out
        record_move(own, store)
    elif own not in moves_carried_out(own.model, read_versions(own.model), store):
        return False
    else:
        confirm(own, store)
    settle_move(own)
    _emit(own, store)
    return True


def moves_carried_out(name: str, versions: "list[RegisteredVersion]", store: Store) -> list[Move]:
    """Return the moves of a model that were carried out, in order, rejections included."""
    champion = read_model(name).aliases.get(CHAMPION)
    history = read_history(store, name, versions, restore=False)
    done, _ = trace(history.moves, champion, history.confirmed)
    return [move for move, carried_out in zip(history.moves, done, strict=True) if carried_out]


def champion_before(
    champion: ModelVersion | None, moves: list[Move], known: Mapping[str, ModelVersion]
) -> ModelVersion | None:
    """Return the version that a champion replaced when it last became champion.

    `known` holds the versions by address. None without a champion, or if it replaced none of them.
    """
    for move in reversed(moves):
        if champion and move.action != "reject" and move.to_version == champion.version:
            return known.get(f"models:/{move.model}/{move.from_version}")
    return None


def record_move(move: Move, store: Store) -> None:
    """Record a move in its tag, then as an object in the store.

    The tag first: a repeat finds the move there, and its object can be restored from it.
    """
    client().set_model_version_tag(move.model, move.to_version, move.tag, move.content)
    store.put(move.name, move.content.encode())


def settle_move(move: Move) -> None:
    """Append a move to its version's description, and take the alias `challenger` from it."""
    done = {"promote": "promoted", "approve": "approved", "reject": "rejected"}
    sentence = f"{done.get(move.action, 'rolled back to')} by {move.who}: {move.why}"
    append_description(
        move.model, move.to_version, f"Move {move.sequence}: {sentence} ({move.run_url})"
    )
    take_challenger_from(move.model, move.to_version)


def take_challenger_from(name: str, number: str) -> None:
    """Take the alias `challenger` from a version, if it has it. The caller holds `exclusive`."""
    if read_model(name).aliases.get(CHALLENGER) == str(number):
        client().delete_registered_model_alias(name, CHALLENGER)


def _emit(move: Move, store: Store) -> None:
    """Emit the event of a move that was carried out; a rejection has none."""
    if move.action in _EVENTS:
        _, tags = read_version(move.model, int(move.to_version))
        emit(
            _EVENTS[move.action],
            f"model.{move.model}",
            move.digest,
            {
                "model": move.model,
                "from": move.from_version,
                "to": move.to_version,
                "artifact_sha256": tags.artifact_sha256,
                "snapshot": tags.snapshot,
                "store": store.address,
            },
        )


def append_description(name: str, number: str, text: str) -> None:
    """Append a paragraph to the description of a version, unless it is there."""
    description = client().get_model_version(name, number).description or ""
    if text not in description:
        client().update_model_version(name, number, f"{description}\n\n{text}".strip())
