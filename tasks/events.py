"""Named events for other systems, on Prefect's event bus.

    model.promoted, model.rolled-back     resource model.NAME
    batch.accepted, batch.quarantined     resource dataset.NAME

Each is emitted once the thing has really happened, and again when a repeat finds that it had; it
then has the same id. They may be lost when a process is killed: what counts is in the store.
"""

from uuid import NAMESPACE_URL, uuid5

from prefect.events import emit_event

from tasks.history import Action, Move
from tasks.records import Verdict

_MOVES: dict[Action, str] = {
    "promote": "model.promoted",
    "approve": "model.promoted",
    "roll back": "model.rolled-back",
}


def emit_move(move: Move, artifact: str, snapshot: str, store: str) -> None:
    """Emit that the champion moved; `artifact` and `snapshot` are digests of the new one."""
    if move.action in _MOVES:
        _emit(
            _MOVES[move.action],
            f"model.{move.model}",
            move.digest,
            {
                "model": move.model,
                "from": move.from_version,
                "to": move.to_version,
                "artifact_sha256": artifact,
                "snapshot": snapshot,
                "store": store,
            },
        )


def emit_verdict(verdict: Verdict, store: str) -> None:
    """Emit that the verdict on a batch counts."""
    _emit(
        "batch.accepted" if verdict.accepted else "batch.quarantined",
        f"dataset.{verdict.dataset}",
        f"{store} {verdict.dataset} {verdict.sequence} {verdict.digest}",
        {
            "dataset": verdict.dataset,
            "model": f"{verdict.dataset}-cnn",
            "batch": verdict.batch,
            "digest": verdict.digest,
            "images": verdict.images,
            "store": store,
        },
    )


def _emit(event: str, resource: str, identity: str, payload: dict[str, object]) -> None:
    """Emit an event; Prefect logs what goes wrong, and nothing is raised."""
    emit_event(
        event=event,
        resource={"prefect.resource.id": resource, "prefect.resource.name": resource},
        payload=payload,
        id=uuid5(NAMESPACE_URL, f"{event} {identity}"),
    )
