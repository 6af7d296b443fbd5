"""The history of a registered model: its champion's moves, each with author, time and reason.

Each move is kept twice, first as a tag of the version that it is about, then as an object

    STORE/models/NAME/history/SEQUENCE-SHA256.json

named by the digest of its content, which includes the digest of the move before. So a move that is
changed, inserted or taken out is detected; a lost object is restored from its tag.
Moves are written before they are carried out. Once the alias has moved, an object

    STORE/models/NAME/carried-out/SEQUENCE-SHA256.json

confirms it, so that an alias that somebody moves back by hand is not taken for a move that was cut
short. A move without confirmation, older than these objects or of a run that died in between,
counts as carried out if the next move, or the registry, has its version as champion.
"""

import hashlib
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Literal

from prefect import runtime
from pydantic import BaseModel, ValidationError

from mnist_cnn.record import Record
from tasks import keys
from tasks.services.s3 import Store

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion as RegisteredVersion

Action = Literal["promote", "approve", "reject", "roll back"]

_TAG = "history."


class Account(BaseModel, frozen=True):
    """Author and reason of a change to the registry."""

    who: str
    why: str


class Move(Record):
    """A change of the champion, or the rejection of a challenger."""

    sequence: int
    """From 1, without gaps."""
    action: Action
    model: str
    from_version: str | None
    """Champion at that time; None if there was none."""
    to_version: str
    """Version that was promoted, rolled back to or rejected."""
    who: str
    why: str
    when: datetime
    run: str
    """Prefect flow run that carried it out."""
    run_url: str
    follows: str | None
    """Digest of the move before; None of the first."""

    @property
    def content(self) -> str:
        """Content of both the tag and the object, as JSON."""
        return self.model_dump_json()

    @property
    def digest(self) -> str:
        """SHA-256 of the content."""
        return hashlib.sha256(self.content.encode()).hexdigest()

    @property
    def name(self) -> str:
        """Name of its object in a store."""
        return keys.move(self.model, self.sequence, self.digest)

    @property
    def confirmation(self) -> str:
        """Name of the object that confirms that it was carried out."""
        return keys.confirmation(self.model, self.sequence, self.digest)

    @property
    def tag(self) -> str:
        """Key of its tag."""
        return f"{_TAG}{self.sequence:06d}"


class CarriedOut(Record):
    """Content of a confirmation, for people: only its name is ever evaluated."""

    move: str
    """Digest of the move."""
    when: datetime


@dataclass(frozen=True)
class History:
    """All readable moves of a model, and the problems of their chain."""

    moves: tuple[Move, ...]
    problems: tuple[str, ...]
    """One sentence each; none if the chain is whole."""
    lost: tuple[Move, ...]
    """Moves that are left only in the tags."""
    confirmed: frozenset[str] = frozenset()
    """Digests of the moves whose confirmation exists."""


def check_history(stored: Mapping[str, bytes], tagged: Iterable[tuple[str, str]]) -> History:
    """Put moves in order and verify each against its own digest, its twin and its predecessor.

    `stored` holds the objects by name, `tagged` the tags as key and value. The twin of an object is
    the tag with the same sequence number.
    """
    problems: list[str] = []
    # Either copy of a move is enough to read it; both are needed to find one that was rewritten.
    objects = _index_objects(stored, problems)
    tags = _index_tags(tagged, problems)
    moves: list[Move] = []
    for sequence in range(1, max([*objects, *tags], default=0) + 1):
        move = objects.get(sequence)
        twin = tags.get(sequence)
        if move and twin and move != twin:
            problems.append(f"move {sequence} reads differently in its object and in its tag")
        move = move or twin
        if not move:
            problems.append(f"move {sequence} is missing, in the store and in the registry's tags")
            continue
        before = moves[-1] if moves else None
        if move.follows != (before.digest if before else None):
            problems.append(
                f"move {sequence} does not follow the move before it as that reads now: one of "
                "them was rewritten or taken out"
            )
        moves.append(move)
    lost = tuple(move for sequence, move in tags.items() if sequence not in objects)
    return History(tuple(moves), tuple(problems), lost)


def _index_objects(stored: Mapping[str, bytes], problems: list[str]) -> dict[int, Move]:
    """Return the moves in objects by sequence number; append to `problems` for the others."""
    found: dict[int, Move] = {}
    for name, content in stored.items():
        move = _parse(content, name, problems)
        if move and (move.name != name or move.content.encode() != content):
            digest = hashlib.sha256(content).hexdigest()
            problems.append(f"{name} was changed after it was written: its digest is now {digest}")
        elif move and move.sequence in found:
            problems.append(f"move {move.sequence} was written twice: {name} is the second")
        elif move:
            found[move.sequence] = move
    return found


def _index_tags(tagged: Iterable[tuple[str, str]], problems: list[str]) -> dict[int, Move]:
    """Return the moves in tags by sequence number; append to `problems` for the others."""
    found: dict[int, Move] = {}
    for key, text in tagged:
        move = _parse(text.encode(), f"tag {key}", problems)
        if move and (move.tag != key or move.sequence in found):
            problems.append(f"tag {key} tells of move {move.sequence}, which has another tag")
        elif move:
            found[move.sequence] = move
    return found


def trace(
    moves: Iterable[Move], champion: str | None, confirmed: Container[str] = ()
) -> tuple[list[bool], list[str]]:
    """Return for each move whether it was carried out, and a sentence for each unexplained change.

    A move was carried out if it is confirmed, or if its version was champion at the next move, or
    now if it is the last. A rejection always was. `champion` is the version that has the alias now,
    `confirmed` holds digests.
    """
    moves = list(moves)
    done: list[bool] = []
    unexplained: list[str] = []
    for index, move in enumerate(moves):
        # The champion after this move is the one that the next move found. Rejections move none.
        later = [other for other in moves[index + 1 :] if other.action != "reject"]
        after = later[0].from_version if later else champion
        certain = move.action == "reject" or move.digest in confirmed
        done.append(certain or after == move.to_version)
        # A run that died before it moved the alias left the former champion in place: no problem.
        cut_short = not certain and after == move.from_version
        if move.action != "reject" and after != move.to_version and not cut_short:
            unexplained.append(
                f"after move {move.sequence} the champion should be version {move.to_version}, but "
                f"was {after or 'none'}: somebody moved the alias past this history"
            )
    if not moves and champion:
        unexplained.append(f"the champion is version {champion}, but the history is empty")
    return done, unexplained


def read_history(
    store: Store, model: str, versions: Iterable["RegisteredVersion"], *, restore: bool
) -> History:
    """Read all moves of a model; with `restore`, write lost objects again from their tags."""
    names = store.names(keys.history(model))
    history = check_history({name: store.get(name) for name in names}, _tags(versions))
    for move in history.lost if restore else ():
        store.put(move.name, move.content.encode())
    stems = [PurePosixPath(name).stem for name in store.names(keys.carried_out(model))]
    return replace(history, confirmed=frozenset(stem.partition("-")[2] for stem in stems))


def confirm(move: Move, store: Store) -> None:
    """Confirm that a move was carried out, by an object in the store."""
    done = CarriedOut(move=move.digest, when=datetime.now(UTC))
    store.put(move.confirmation, done.model_dump_json().encode())


def own_move(versions: Iterable["RegisteredVersion"], action: Action) -> Move | None:
    """Return the newest move with that action that this flow run has begun; None without one."""
    moves = [Move.model_validate_json(text) for _, text in _tags(versions)]
    own = [move for move in moves if (move.run, move.action) == (runtime.flow_run.id, action)]
    return max(own, key=lambda move: move.sequence, default=None)


def plan_move(
    store: Store,
    action: Action,
    versions: Iterable["RegisteredVersion"],
    to: "RegisteredVersion",
    *,
    champion: str | None,
    account: Account,
) -> Move:
    """Return the next move, or the one that an earlier attempt of this flow run has begun.

    A begun move is not resumed if others have moved the champion since: the history would be out of
    order.
    """
    run = runtime.flow_run
    versions = list(versions)
    tagged = [Move.model_validate_json(text) for _, text in _tags(versions)]
    own = own_move(versions, action)
    if own and (own.from_version, own.to_version) == (champion, str(to.version)):
        later = [move for move in tagged if move.sequence > own.sequence]
        if all(move.action == "reject" for move in later):
            return own
    # The newest move, by tags and by objects: either may be lost.
    last = max(((move.sequence, move.digest) for move in tagged), default=(0, ""))
    for name in store.names(keys.history(to.name))[-1:]:
        sequence, _, digest = name.rpartition("/")[2].removesuffix(".json").partition("-")
        last = max(last, (int(sequence), digest))
    return Move(
        sequence=last[0] + 1,
        action=action,
        model=to.name,
        from_version=champion,
        to_version=str(to.version),
        who=account.who,
        why=account.why,
        when=datetime.now(UTC),
        run=str(run.id),
        run_url=str(run.ui_url),
        follows=last[1] or None,
    )


def _tags(versions: Iterable["RegisteredVersion"]) -> list[tuple[str, str]]:
    return [
        (key, text)
        for version in versions
        for key, text in version.tags.items()
        if key.startswith(_TAG)
    ]


def _parse(content: bytes, where: str, problems: list[str]) -> Move | None:
    try:
        return Move.model_validate_json(content)
    except ValidationError as error:
        problems.append(f"{where} does not hold a move ({error.errors()[0]['msg']})")
        return None
