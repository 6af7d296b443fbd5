"""Named events for other systems, on Prefect's event bus.

    model.promoted, model.rolled-back     resource model.NAME
    batch.accepted, batch.quarantined     resource dataset.NAME

Each is emitted once the thing has really happened, and again when a repeat finds that it had; it
then has the same id. They may be lost when a process is killed: what counts is in the store.
"""

from uuid import NAMESPACE_URL, uuid5

from prefect.events import emit_event


def emit(event: str, resource: str, identity: str, payload: dict[str, object]) -> None:
    """Emit an event; Prefect logs what goes wrong, and nothing is raised."""
    emit_event(
        event=event,
        resource={"prefect.resource.id": resource, "prefect.resource.name": resource},
        payload=payload,
        id=uuid5(NAMESPACE_URL, f"{event} {identity}"),
    )
