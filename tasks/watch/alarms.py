"""Automations by which the Prefect server itself notifies people that nothing of ours can run.

watch/always sends all other messages, but none while no worker takes its runs, or while they fail.
Each rule is a sequence of two triggers, "it works" and then "it does not for a while": it fires
once, and not again before it has worked in between.

Neither rule names a pool: a deployment that is added later, in a pool without a worker, is covered
as well. (The server counts the events of all pools together. While another pool works, a pool
without a worker is reported again, at most once for each of its late runs.)
"""

import json
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import UUID

from prefect.events import Event, RelatedResource, Resource
from prefect.events.actions import SendNotification
from prefect.events.schemas.automations import (
    AutomationCore,
    EventTrigger,
    Posture,
    SequenceTrigger,
)

from tasks.runs.states import GIVEN_UP
from tasks.runs.turn import TAG
from tasks.watch.messages import WATCH_FLOW

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

WATCHED = "Watched"
"""Name of the state in which a run of watch/always ends after all its work."""

NO_WORKER_AFTER = timedelta(minutes=8)
"""After a run became Late; ten minutes, with the time that the server takes to notice that."""

WATCH_FAILS_AFTER = timedelta(minutes=20)
"""After a failed run of watch/always: the next three have failed as well, or did not come."""

_ARMED = "notifications.armed"
"""Event that stands for "it works" when a rule is made, as nothing may have run before."""
_TAKEN = {f"prefect.flow-run.{name}" for name in ("Submitting", "Pending", "Running")}
_FAILED = {
    f"prefect.flow-run.{name}" for name in ("Failed", "Crashed", "Timed out", "TimedOut", GIVEN_UP)
}
_OURS = {"prefect.resource.id": f"prefect.tag.{TAG}", "prefect.resource.role": "tag"}
_WATCH = {"prefect.resource.name": WATCH_FLOW, "prefect.resource.role": "flow"}
_IN_A_POOL = {"prefect.resource.role": "work-pool"}
_REPLACED = ("Says once that no worker of pool ", f"Says once that {WATCH_FLOW}/always of ")
"""Beginnings of the descriptions of earlier rules, which these replace."""


def rules(
    blocks: Sequence[UUID],
    no_worker_after: timedelta = NO_WORKER_AFTER,
    watch_fails_after: timedelta = WATCH_FAILS_AFTER,
) -> list[AutomationCore]:
    """Return the automations that send notifications through the blocks."""
    return [_no_worker(blocks, no_worker_after), _watch_fails(blocks, watch_fails_after)]


def _no_worker(blocks: Sequence[UUID], after: timedelta) -> AutomationCore:
    related = [_OURS, _IN_A_POOL]
    taken = EventTrigger(expect={*_TAKEN, _ARMED}, match_related=related, posture=Posture.Reactive)
    left = _missing(
        after={"prefect.flow-run.Late"},
        expect=_TAKEN,
        related=related,
        for_each="related:work-pool:prefect.resource.id",
        within=after,
    )
    return AutomationCore(
        name="no-worker",
        description=f"Says that in a work pool no worker takes the runs of {TAG}.",
        trigger=SequenceTrigger(triggers=[taken, left], within=None),
        actions=_notify(
            blocks,
            "No worker in pool {{ work_pool.name }}",
            "Runs are due in the work pool {{ work_pool.name }}, and for "
            f"{_minutes(after)} minutes none was taken. "
            "Start a worker there (`make up` starts the local one), or raise its limit if it is "
            "only busy. The first that is late is {{ flow_run.name }}: {{ flow_run|ui_url }}",
        ),
    )


def _watch_fails(blocks: Sequence[UUID], after: timedelta) -> AutomationCore:
    related = [_OURS, _WATCH]
    works = f"prefect.flow-run.{WATCHED}"
    worked = EventTrigger(expect={works, _ARMED}, match_related=related, posture=Posture.Reactive)
    failed = _missing(
        after=_FAILED,
        expect={works},
        related=related,
        for_each="related:flow:prefect.resource.id",
        within=after,
    )
    return AutomationCore(
        name="watch-stays-failed",
        description=f"Says that {WATCH_FLOW}/always of {TAG} failed, and did not recover.",
        trigger=SequenceTrigger(triggers=[worked, failed], within=None),
        actions=_notify(
            blocks,
            "watch/always fails",
            "A run of watch/always failed, and in the "
            f"{_minutes(after)} minutes since then none has done all its work: until one does, "
            "crashed runs may not be resumed and messages may be missing. That run: "
            "{{ flow_run.name }}: {{ flow_run|ui_url }}",
        ),
    )


def _missing(
    *,
    after: set[str],
    expect: set[str],
    related: list[dict[str, str]],
    for_each: str,
    within: timedelta,
) -> EventTrigger:
    """Return a trigger that fires if no expected event comes in time after another event.

    Without `for_each` the server opens a window before any event has come.
    """
    return EventTrigger(
        after=after,
        expect=expect,
        match_related=related,
        for_each={for_each},
        posture=Posture.Proactive,
        within=within,
    )


def _minutes(time: timedelta) -> int:
    return max(1, round(time.total_seconds() / 60))


def keep_rules(
    prefect: "SyncPrefectClient",
    blocks: Sequence[UUID],
    no_worker_after: timedelta = NO_WORKER_AFTER,
    watch_fails_after: timedelta = WATCH_FAILS_AFTER,
) -> list[str]:
    """Create the missing rules and make each notify all blocks; return the names of those changed.

    A person's edits of a rule are kept, except for its blocks.
    """
    changed: list[str] = []
    for rule in rules(blocks, no_worker_after, watch_fails_after) if blocks else []:
        present = prefect.read_automations_by_name(rule.name)
        if not present:
            prefect.create_automation(rule)
            changed.append(rule.name)
        elif _notified(present[0]) != set(blocks):
            # Only notifications are exchanged: a person may have added actions of other kinds.
            others = [a for a in present[0].actions if not isinstance(a, SendNotification)]
            kept = AutomationCore.model_validate(present[0].model_dump())
            kept.actions = [*others, *rule.actions]
            prefect.update_automation(present[0].id, kept)
            changed.append(rule.name)
    if changed:
        _arm(prefect)
        _remove_old(prefect)
    return changed


def _remove_old(prefect: "SyncPrefectClient") -> None:
    """Remove the rules of earlier versions, which would send the same messages."""
    for rule in prefect.read_automations():
        if rule.description.startswith(_REPLACED):
            prefect.delete_automation(rule.id)


def _notified(automation: AutomationCore) -> set[UUID]:
    return {a.block_document_id for a in automation.actions if isinstance(a, SendNotification)}


def _arm(prefect: "SyncPrefectClient") -> None:
    """Emit the event that stands for "it works": a changed rule starts without past events."""
    watch = _WATCH | {"prefect.resource.id": f"mnist-retraining.{WATCH_FLOW}"}
    pool = _IN_A_POOL | {"prefect.resource.id": "mnist-retraining.any-pool"}
    event = Event(
        event=_ARMED,
        resource=Resource({"prefect.resource.id": "mnist-retraining.notifications"}),
        related=[RelatedResource(each) for each in [_OURS, watch, pool]],
    )
    prefect.request("POST", "/events", json=[json.loads(event.model_dump_json())])


def _notify(blocks: Sequence[UUID], subject: str, body: str) -> list[SendNotification]:
    return [
        SendNotification(block_document_id=block, subject=subject, body=body) for block in blocks
    ]
