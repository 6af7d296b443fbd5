"""Ingest the batches that have arrived: each becomes training data, or is quarantined."""

from typing import Annotated

from prefect import flow
from prefect.client.schemas import State
from prefect.states import Completed, Failed
from pydantic import Field, StringConstraints

from tasks.ingest import find_arrivals, find_intake, ingest_batch, keep_intake, report_ingest
from tasks.preflight import check_services
from tasks.promote import find_champion
from tasks.records import BatchVerdict, RejectedSnapshot, ValidatedSnapshot
from tasks.runs.attempt import TimeLimit, in_time
from tasks.runs.outcome import once
from tasks.runs.turn import in_turn
from tasks.services.s3 import DEFAULT_STORE
from tasks.snapshot import Dataset, accept_base, compare_snapshots, take_snapshot
from tasks.sweep import find_waiting_datasets, start_ingests
from tasks.validate import validate_snapshot

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
QuietMinutes = Annotated[float, Field(ge=0, le=24 * 60)]


@flow(name="ingest", flow_run_name="batches of {dataset}")
@once
@in_turn
@in_time
def ingest(
    dataset: Dataset = "mnist",
    store: str = DEFAULT_STORE,
    quiet_minutes: QuietMinutes = 10,
    time_limit_minutes: TimeLimit = 60,
) -> State[object]:
    """Judge every batch that has arrived: it becomes training data, or is quarantined.

    Args:
        dataset: `mnist`, `digits` (the embedded sample), `auto`, or a data set of your own.
        store: Address of data and records, `s3://BUCKET` or `s3://BUCKET/PREFIX`.
        quiet_minutes: Minutes without a write after which a batch without the marker `_SUCCESS` is
            complete.
        time_limit_minutes: A run that takes longer is ended, as Timed out.

    """
    check_services(store)
    validated, verdicts, summary = take_in(dataset, store, quiet_minutes)
    if isinstance(validated, RejectedSnapshot):
        return Failed(name="Data rejected", message=summary)
    accepted = [verdict for verdict in verdicts if verdict.accepted]
    name = "Batches accepted" if accepted else "Batches quarantined" if verdicts else "No batch"
    return Completed(name=name, message=summary)


@flow(name="ingest", flow_run_name="snapshots of {dataset}")
@in_time
def compare(
    before: Digest,
    after: Digest,
    dataset: Dataset = "mnist",
    store: str = DEFAULT_STORE,
    time_limit_minutes: TimeLimit = 60,
) -> State[object]:
    """Compare two snapshots: the batches in between, and their changes of labels and images.

    Args:
        before: Digest of a snapshot, as in the tag `snapshot` of a registered version.
        after: Digest of another one.
        dataset: Data set of the snapshots.
        store: Address of data and records.
        time_limit_minutes: A run that takes longer is ended, as Timed out.

    """
    return Completed(name="Compared", message=compare_snapshots(dataset, before, after, store))


@flow(name="ingest", flow_run_name="all data sets")
@in_time
def sweep(store: str = DEFAULT_STORE, time_limit_minutes: TimeLimit = 60) -> State[object]:
    """Start ingest/on-arrival for every data set that has something in `incoming/`.

    Args:
        store: Address of data and records.
        time_limit_minutes: A run that takes longer is ended, as Timed out.

    """
    started, faults = start_ingests(find_waiting_datasets(store), store)
    summary = f"started for {', '.join(started)}" if started else "nothing has arrived"
    if faults:
        return Failed(name="Not started", message="; ".join([*faults, summary]))
    return Completed(name="Swept", message=summary)


def take_in(
    dataset: str, store: str, quiet_minutes: float
) -> tuple[ValidatedSnapshot | RejectedSnapshot, list[BatchVerdict], str]:
    """Judge all batches that have arrived; return the snapshot, the verdicts and their summary.

    Shared by `ingest` and `train`. A flow run that is resumed later continues with the same data;
    batches that have arrived since are left to another run.
    """
    if intake := find_intake(store):
        return intake.validated, intake.verdicts, intake.told
    snapshot = take_snapshot(dataset, store)
    validated = validate_snapshot(snapshot)
    if isinstance(validated, RejectedSnapshot):
        return validated, [], "; ".join(validated.failures)
    accept_base(validated)
    arrivals = find_arrivals(snapshot, quiet_minutes)
    champion = find_champion(snapshot.model_name) if arrivals.complete else None
    judged = [ingest_batch(snapshot, batch, champion) for batch in arrivals.complete]
    verdicts = [*arrivals.judged, *(verdict for verdict in judged if verdict)]
    summary = report_ingest(verdicts, arrivals, store)
    # Accepted batches extend the data set: it has a new snapshot, which is validated as a whole.
    if any(verdict.accepted for verdict in verdicts):
        validated = validate_snapshot(take_snapshot(snapshot.dataset, store))
    if isinstance(validated, ValidatedSnapshot):
        keep_intake(validated, verdicts, summary, store)
    return validated, verdicts, summary
