"""Rules by which the Prefect server itself tells people that nothing of ours can run.

watch/always sends the messages, so that nobody would hear of it when no worker takes its runs, or
when they fail. Each rule is a sequence of two triggers, "it works" and then "it does not": it fires
once, and not again before it worked in between.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import UUID

from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterTags
from prefect.events import Event, RelatedResource, Resource
from prefect.events.actions import SendNotification
from prefect.events.schemas.automations import (
    AutomationCore,
    EventTrigger,
    Posture,
    SequenceTrigger,
)

from tasks.runs.turn import TAG
from tasks.watch.messages import WATCH_FLOW

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

WATCHED = "Watched"
"""Name of the state in which a run of watch/always ends that did all its work."""

NO_WORKER_AFTER = timedelta(minutes=8)
"""After a run was called late; with what the server takes to see that, ten minutes."""

_ARMED = "notifications.armed"
"""The event that stands for "it works" when a rule is made: nothing may have run before."""
_TAKEN = {"prefect.flow-run.Submitting", "prefect.flow-run.Pending", "prefect.flow-run.Running"}
_OURS = {"prefect.resource.id": f"prefect.tag.{TAG}", "prefect.resource.role": "tag"}
_WATCH = {"prefect.resource.name": WATCH_FLOW, "prefect.resource.role": "flow"}
_FAILURES, _FAILURES_WITHIN = 2, timedelta(hours=1)


def rules(
    pools: Mapping[str, UUID], blocks: Sequence[UUID], after: timedelta = NO_WORKER_AFTER
) -> list[AutomationCore]:
    """Return the rules that send notifications to the blocks: one for each work pool, one for all.

    `pools` are those that deployments of ours use.
    """
    return [
        *(_no_worker(name, pool, blocks, after) for name, pool in pools.items()),
        _watch_fails(blocks),
    ]


def _no_worker(name: str, pool: UUID, blocks: Sequence[UUID], after: timedelta) -> AutomationCore:
    related = [_OURS, _pool(pool)]
    taken = EventTrigger(expect={*_TAKEN, _ARMED}, match_related=related, posture=Posture.Reactive)
    # Without `for_each` the server opens a window for a Proactive trigger before any run is late.
    left = EventTrigger(
        after={"prefect.flow-run.Late"},
        expect=_TAKEN,
        match_related=related,
        for_each={"related:work-pool:prefect.resource.id"},
        posture=Posture.Proactive,
        within=after,
    )
    minutes = max(1, round(after.total_seconds() / 60))
    return AutomationCore(
        name=f"no-worker-{name}",
        description=f"Says once that no worker of pool {name} takes the runs of {TAG}.",
        trigger=SequenceTrigger(triggers=[taken, left], within=None),
        actions=_notify(
            blocks,
            f"No worker in pool {name}",
            f"Runs are due in the work pool {name}, and for {minutes} minutes none was taken. "
            "Start a worker there (`make up` starts the local one), or raise its limit if it is "
            "only busy. The first that is late is {{ flow_run.name }}: {{ flow_run|ui_url }}",
        ),
    )


def _watch_fails(blocks: Sequence[UUID]) -> AutomationCore:
    related = [_OURS, _WATCH]
    worked = EventTrigger(
        expect={f"prefect.flow-run.{WATCHED}", _ARMED},
        match_related=related,
        posture=Posture.Reactive,
    )
    failed = EventTrigger(
        expect={"prefect.flow-run.*"},
        match={"prefect.state-type": ["FAILED", "CRASHED"]},
        match_related=related,
        posture=Posture.Reactive,
        threshold=_FAILURES,
        within=_FAILURES_WITHIN,
    )
    return AutomationCore(
        name="watch-fails",
        description=f"Says once that {WATCH_FLOW}/always of {TAG} fails.",
        trigger=SequenceTrigger(triggers=[worked, failed], within=None),
        actions=_notify(
            blocks,
            "watch/always fails",
            f"{_FAILURES} runs of {WATCH_FLOW}/always failed: crashed runs are not resumed and no "
            "message is sent until it works. The last: {{ flow_run.name }}: {{ flow_run|ui_url }}",
        ),
    )


def keep_rules(
    prefect: "SyncPrefectClient", blocks: Sequence[UUID], after: timedelta = NO_WORKER_AFTER
) -> list[str]:
    """Make the rules that are missing and let all of them notify the blocks; return what changed.

    What a person edited stays, but for the blocks.
    """
    pools = _pools(prefect)
    changed: list[str] = []
    for rule in rules(pools, blocks, after) if blocks else []:
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
        _arm(prefect, pools.values())
    return changed


def _pools(prefect: "SyncPrefectClient") -> dict[str, UUID]:
    """Return the work pools of our deployments."""
    ours = DeploymentFilter(tags=DeploymentFilterTags(all_=[TAG]))
    deployments = prefect.read_deployments(deployment_filter=ours)
    names = {each.work_pool_name for each in deployments if each.work_pool_name}
    return {name: prefect.read_work_pool(name).id for name in sorted(names)}


def _notified(automation: AutomationCore) -> set[UUID]:
    return {a.block_document_id for a in automation.actions if isinstance(a, SendNotification)}


def _arm(prefect: "SyncPrefectClient", pools: Iterable[UUID]) -> None:
    """Emit the event that stands for "it works": whoever changes a rule resets what it has seen."""
    watch = _WATCH | {"prefect.resource.id": f"mnist-retraining.{WATCH_FLOW}"}
    event = Event(
        event=_ARMED,
        resource=Resource({"prefect.resource.id": "mnist-retraining.notifications"}),
        related=[RelatedResource(each) for each in [_OURS, watch, *map(_pool, pools)]],
    )
    prefect.request("POST", "/events", json=[json.loads(event.model_dump_json())])


def _pool(pool: UUID) -> dict[str, str]:
    return {
        "prefect.resource.id": f"prefect.work-pool.{pool}",
        "prefect.resource.role": "work-pool",
    }


def _notify(blocks: Sequence[UUID], subject: str, body: str) -> list[SendNotification]:
    return [
        SendNotification(block_document_id=block, subject=subject, body=body) for block in blocks
    ]
