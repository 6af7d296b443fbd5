"""Keep the schedules of single data sets about their data sets.

Prefect's server empties the parameters of a schedule that is switched on or off without them, which
is how its UI switches: the week of a data set of one's own would then train on the default one. The
slug of such a schedule is the data set's name, and stays.
"""

from collections.abc import Iterator

from prefect import get_run_logger
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterTags
from prefect.client.schemas.objects import DeploymentSchedule
from prefect.client.schemas.responses import DeploymentResponse

from tasks.runs.turn import TAG
from tasks.services.s3 import Store
from tasks.services.step import step


@step
def restore_schedules(store: str) -> list[str]:
    """Name the data set again in each schedule that lost it; return a sentence for each."""
    with get_client(sync_client=True) as prefect:
        done = []
        for deployment, schedule in _forgetful(prefect, Store(store)):
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


def _forgetful(
    prefect: SyncPrefectClient, store: Store
) -> Iterator[tuple[DeploymentResponse, DeploymentSchedule]]:
    """Yield the schedules of training without a parameter that are named as a data set is."""
    trainings = DeploymentFilter(tags=DeploymentFilterTags(all_=[TAG, "training"]))
    for deployment in prefect.read_deployments(deployment_filter=trainings):
        for schedule in deployment.schedules:
            if (
                schedule.slug
                and not schedule.parameters
                and store.names(f"datasets/{schedule.slug}/base")
            ):
                yield deployment, schedule
