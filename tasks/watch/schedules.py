"""Restore the schedules of single data sets that have lost their parameter.

Prefect's server empties the parameters of a schedule that is switched on or off without them, as
its UI does it: the weekly run of a user's own data set would then train on the default one. The
slug of such a schedule is the name of its data set, and stays.
"""

from collections.abc import Iterator

from prefect import get_run_logger
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterTags
from prefect.client.schemas.objects import DeploymentSchedule
from prefect.client.schemas.responses import DeploymentResponse

from tasks import keys
from tasks.datasets.catalog import KNOWN
from tasks.runs.turn import TAG
from tasks.services.s3 import Store
from tasks.services.step import step


@step
def restore_schedules(store: str) -> list[str]:
    """Set the data set again in each schedule that has lost it; return a sentence for each."""
    with get_client(sync_client=True) as prefect:
        done = []
        for deployment, schedule in _find_emptied(prefect, Store(store)):
            prefect.update_deployment_schedule(
                deployment.id, schedule.id, parameters={"dataset": schedule.slug}
            )
            done.append(
                f"restore schedule {schedule.slug}: it had lost the name of its data set, as it "
                "does when it is switched in Prefect's UI"
            )
    for sentence in done:
        get_run_logger().warning(sentence)
    return done


def _find_emptied(
    prefect: SyncPrefectClient, store: Store
) -> Iterator[tuple[DeploymentResponse, DeploymentSchedule]]:
    """Yield the training schedules without parameters whose slug is the name of a data set."""
    trainings = DeploymentFilter(tags=DeploymentFilterTags(all_=[TAG, "training"]))
    for deployment in prefect.read_deployments(deployment_filter=trainings):
        for schedule in deployment.schedules:
            if (
                schedule.slug
                and not schedule.parameters
                # Any other data set of the store has a base; any other slug does not name one.
                and (schedule.slug in KNOWN or _has_base(store, schedule.slug))
            ):
                yield deployment, schedule


def _has_base(store: Store, dataset: str) -> bool:
    return store.has(keys.base(dataset)) or bool(store.names(keys.archives(dataset)))
