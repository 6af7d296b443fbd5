"""Named events for other systems, on Prefect's event bus.

    model.promoted, model.rolled-back     resource model.NAME
    batch.accepted, batch.quarantined     resource dataset.NAME

Each is emitted after the fact, and again, with the same id, when a repeated step finds the fact.
Events may be lost when a process is killed: the records in the store are authoritative.
"""

from uuid import NAMESPACE_URL, uuid5

from prefect.events import emit_event


def emit(event: str, resource: str, identity: str, payload: dict[str, object]) -> None:
    """Emit an event; a failure is logged by Prefect and not raised."""
    # One identity gives one id, by which a receiver recognises a repeat.
    emit_event(
        event=event,
        resource={"prefect.resource.id": resource, "prefect.resource.name": resource},
        payload=payload,
        id=uuid5(NAMESPACE_URL, f"{event} {identity}"),
    )
