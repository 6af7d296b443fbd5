"""Rules by which the Prefect server itself tells people that nothing of ours can run.

watch/always sends the messages, so that nobody would hear of it when no worker takes its runs, or
when they fail. Each rule is a sequence of two triggers, "it works" and then "it does not for a
while": it fires once, and not again before it worked in between.

Neither names a pool: a deployment that is made later, in a pool that has no worker, is covered as
well. (The server counts what works for all pools together, so that where another pool works a pool
without a worker is told of again, at most once for each of its runs that is late.)
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
"""Name of the state in which a run of watch/always ends that did all its work."""

NO_WORKER_AFTER = timedelta(minutes=8)
"""After a run was called late; with what the server takes to see that, ten minutes."""

WATCH_FAILS_AFTER = timedelta(minutes=20)
"""After a run of watch/always failed: the next three have failed as well, or did not come."""

_ARMED = "notifications.armed"
"""The event that stands for "it works" when a rule is made: nothing may have run before."""
_TAKEN = {f"prefect.flow-run.{name}" for name in ("Submitting", "Pending", "Running")}
_FAILED = {
    f"prefect.flow-run.{name}" for name in ("Failed", "Crashed", "Timed out", "TimedOut", GIVEN_UP)
}
_OURS = {"prefect.resource.id": f"prefect.tag.{TAG}", "prefect.resource.role": "tag"}
_WATCH = {"prefect.resource.name": WATCH_FLOW, "prefect.resource.role": "flow"}
_IN_A_POOL = {"prefect.resource.role": "work-pool"}
_OF_OLD = ("Says once that no worker of pool ", f"Says once that {WATCH_FLOW}/always of ")
"""How the descriptions of rules begin that these rules replace."""


def rules(
    blocks: Sequence[UUID],
    no_worker_after: timedelta = NO_WORKER_AFTER,
    watch_fails_after: timedelta = WATCH_FAILS_AFTER,
) -> list[AutomationCore]:
    """Return the rules that send notifications to the blocks."""
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
    """Return a trigger for what does not come in time after something else.

    Without `for_each` the server opens a window for it before anything has happened.
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
    """Make the rules that are missing and let all of them notify the blocks; return what changed.

    What a person edited stays, but for the blocks.
    """
    changed: list[str] = []
    for rule in rules(blocks, no_worker_after, watch_fails_after) if blocks else []:
        present = prefect.read_automations_by_name(rule.name)
        if not present:
            prefect.create_automation(rule)
            changed.append(rule.name)
        elif _notified(present[0]) != set(blocks):
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
    """Remove the rules of earlier versions, which would say the same."""
    for rule in prefect.read_automations():
        if rule.description.startswith(_OF_OLD):
            prefect.delete_automation(rule.id)


def _notified(automation: AutomationCore) -> set[UUID]:
    return {a.block_document_id for a in automation.actions if isinstance(a, SendNotification)}


def _arm(prefect: "SyncPrefectClient") -> None:
    """Emit the event that stands for "it works": whoever changes a rule resets what it has seen."""
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
