"""The situation that messages are composed from, read from Prefect and the store."""

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TypeVar
from uuid import UUID

from prefect import get_run_logger
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterTags,
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterCreatedBy,
    FlowRunFilterEndTime,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterState,
    FlowRunFilterStateName,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import DeploymentSchedule, FlowRun, StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.sorting import FlowRunSort
from prefect.utilities.urls import url_for
from pydantic import ValidationError

from tasks import keys
from tasks.records import BatchVerdict, RunSummary
from tasks.runs.turn import OVERTAKEN, TAG
from tasks.services.s3 import StorageRefused, Store
from tasks.watch.messages import (
    DROUGHT,
    NEWS,
    EndedRun,
    IdleSchedule,
    Situation,
    Training,
    key_of,
    last_batches,
)

T = TypeVar("T")
Parameters = dict[UUID | None, dict[str, object]]
"""Default parameters by deployment."""

_PAGE = 200
"""The largest number of objects that the server returns at once."""
_TRAININGS_SINCE = timedelta(days=30)
_GRACE = timedelta(days=1)
_GAPS_AHEAD = timedelta(days=400)
_NEVER = timedelta(days=3 * 366)
"""A schedule whose next date is further away counts as ended."""
_SCHEDULED_AHEAD = timedelta(days=90)
"""The server makes the runs of a hundred days; a schedule may have no date in them."""
_SETTLE_SECONDS = 15.0
"""Time that the server needs to make the runs of a schedule that was just switched on."""
_INGESTED = ["Batches accepted", "Batches quarantined"]
"""States that show which data sets have batches; the verdicts on them are in the ledger."""


@dataclass(frozen=True)
class Subject:
    """A data set in a store."""

    dataset: str
    store: str


@dataclass(frozen=True)
class Due:
    """The trainings that the schedules of a data set promise."""

    since: datetime
    """Time at which the first of the schedules was made."""
    limit: timedelta
    """Time that the data set may be without a successful training."""


def look(
    prefect: SyncPrefectClient, store: Store, since: datetime, sent: set[str], now: datetime
) -> Situation:
    """Return the events since a time and the present faults; `sent` are keys of sent messages."""
    deployments = _read_deployments(prefect)
    runs = _read_ended(prefect, since)
    parameters: Parameters = {each.id: _defaults(each) for each in deployments}
    flows = _name_flows(prefect, deployments)
    due = _find_due(deployments, flows, now)
    attempts = take_trainings(
        _read_trainings(prefect, now), parameters, due, since=now - _TRAININGS_SINCE
    )
    # Data sets are found where schedules and recent runs name them, defaults included.
    subjects = {
        subject
        for given in [
            *(known for each in deployments for known in _scheduled_parameters(each)),
            *(parameters.get(run.deployment_id, {}) | run.parameters for run in [*runs, *attempts]),
        ]
        if (subject := _subject(given))
    }
    flows |= _name_flows(prefect, [run for run in runs if run.flow_id not in flows])
    ended = [_ended(run, flows[run.flow_id], parameters.get(run.deployment_id, {})) for run in runs]
    return Situation(
        now=now,
        runs=tuple(
            _with_summary(run, given.get("store"))
            for run, given in ended
            if (key := key_of(run, now)) and key not in sent
        ),
        refused=tuple(_read_refused(subjects, store.address, since, last_batches(sent))),
        trainings=tuple(describe_trainings(attempts, parameters, due)),
        idle=_find_idle(prefect, flows, now),
    )


def _pages(read: Callable[[int], Sequence[T]]) -> Iterator[T]:
    """Yield the objects of a query, page by page as they are needed; `read` takes the offset."""
    offset = 0
    while page := read(offset):
        yield from page
        offset += len(page)
        if len(page) < _PAGE:
            break


def _read_deployments(prefect: SyncPrefectClient) -> list[DeploymentResponse]:
    ours = DeploymentFilter(tags=DeploymentFilterTags(all_=[TAG]))
    return list(
        _pages(
            lambda offset: prefect.read_deployments(
                deployment_filter=ours, limit=_PAGE, offset=offset
            )
        )
    )


def _read_runs(
    prefect: SyncPrefectClient, flow: str | None = None, **criteria: object
) -> Iterator[FlowRun]:
    """Yield our runs that meet the criteria, the newest first."""
    wanted = FlowRunFilter.model_validate({"tags": FlowRunFilterTags(all_=[TAG]), **criteria})
    named = FlowFilter(name=FlowFilterName(any_=[flow])) if flow else None
    return _pages(
        lambda offset: prefect.read_flow_runs(
            flow_filter=named,
            flow_run_filter=wanted,
            sort=FlowRunSort.EXPECTED_START_TIME_DESC,
            limit=_PAGE,
            offset=offset,
        )
    )


def _read_ended(prefect: SyncPrefectClient, since: datetime) -> list[FlowRun]:
    """Return the runs that may be worth a message; runs of watch/always alone are 720 a day."""
    ended = FlowRunFilterEndTime(after_=since)
    faults = FlowRunFilterStateType(any_=[StateType.FAILED, StateType.CRASHED])
    news = FlowRunFilterState(
        type=FlowRunFilterStateType(any_=[StateType.COMPLETED]),
        name=FlowRunFilterStateName(any_=[*NEWS, *_INGESTED]),
    )
    return [
        *_read_runs(prefect, end_time=ended, state=FlowRunFilterState(type=faults)),
        *_read_runs(prefect, end_time=ended, state=news),
    ]


def _read_trainings(prefect: SyncPrefectClient, now: datetime) -> Iterator[FlowRun]:
    due = FlowRunFilterExpectedStartTime(before_=now)
    return _read_runs(prefect, "train", expected_start_time=due)


def _name_flows(
    prefect: SyncPrefectClient, things: Iterable[FlowRun | DeploymentResponse]
) -> dict[UUID, str]:
    return {flow: prefect.read_flow(flow).name for flow in {thing.flow_id for thing in things}}


def _defaults(deployment: DeploymentResponse) -> dict[str, object]:
    """Return the parameters of a run that is started without any."""
    form = (deployment.parameter_openapi_schema or {}).get("properties", {})
    stated = {name: field["default"] for name, field in form.items() if "default" in field}
    return {**stated, **deployment.parameters}


def _scheduled_parameters(deployment: DeploymentResponse) -> Iterator[dict[str, object]]:
    """Yield the parameters of the runs that the active schedules of a deployment make."""
    for schedule in _active(deployment):
        yield {**_defaults(deployment), **schedule.parameters}


def _active(deployment: DeploymentResponse) -> list[DeploymentSchedule]:
    paused = deployment.paused
    return [each for each in deployment.schedules if each.active and not paused]


def _subject(given: Mapping[str, object]) -> Subject | None:
    dataset = given.get("dataset")
    store = given.get("store")
    # `auto` is resolved within a run, so it names no data set here.
    known = isinstance(dataset, str) and isinstance(store, str) and dataset != "auto"
    return Subject(str(dataset), str(store).rstrip("/")) if known else None


def _ended(
    run: FlowRun, flow: str, defaults: Mapping[str, object]
) -> tuple[EndedRun, dict[str, object]]:
    """Return a run in the form that messages use, and all its parameters."""
    assert run.state, f"run {run.id} has ended without a state"
    given = {**defaults, **run.parameters}
    dataset = given.get("dataset")
    model = given.get("model")
    # The flows of promote have a model in place of a data set.
    if isinstance(model, str):
        dataset = model.removesuffix("-cnn")
    ended = EndedRun(
        id=str(run.id),
        name=run.name,
        flow=flow,
        type=run.state.type.value,
        state=run.state.name or run.state.type.value.title(),
        reason=run.state.message or "no reason was given",
        since=run.state.timestamp,
        url=url_for("flow-run", obj_id=run.id) or "",
        dataset=dataset if isinstance(dataset, str) else None,
        attempt=run.run_count,
    )
    return ended, given


def _with_summary(run: EndedRun, store: object) -> EndedRun:
    """Add the summary of a run, if it wrote one."""
    try:
        written = Store(str(store)).get(keys.record(run.id, "summary"))
        summary = RunSummary.model_validate_json(written)
    except (FileNotFoundError, StorageRefused, ValueError):
        # It ended before it wrote one, its store is invalid or gone, or another release wrote it:
        # the state is enough.
        return run
    return EndedRun(**{**vars(run), "summary": summary})


def _read_refused(
    subjects: Iterable[Subject], home: str, since: datetime, reported: Mapping[str, int]
) -> Iterator[BatchVerdict]:
    """Yield the verdicts on quarantined batches for which no message was sent.

    Only those in `home`, the store of the messages: a message's key has a position in the ledger,
    but no store. `reported` is the last position that was reported, for each data set.
    """
    for subject in sorted(subjects, key=lambda each: each.dataset):
        if subject.store != home:
            continue
        store = Store(subject.store)
        for entry in store.entries(keys.ledger(subject.dataset)):
            if entry.name.endswith(".json") and entry.modified >= since:
                try:
                    verdict = BatchVerdict.model_validate_json(store.get(entry.name))
                except ValidationError as error:
                    get_run_logger().warning("%s is no verdict: %s", entry.name, error)
                    continue
                if not verdict.accepted and verdict.sequence > reported.get(subject.dataset, 0):
                    yield verdict


def _find_due(
    deployments: Iterable[DeploymentResponse], flows: Mapping[UUID, str], now: datetime
) -> dict[str, Due]:
    """Return the promise of the active training schedules for each data set."""
    due = dict[str, Due]()
    for deployment in deployments:
        for schedule in _active(deployment) if flows[deployment.flow_id] == "train" else []:
            dataset = str({**_defaults(deployment), **schedule.parameters}.get("dataset"))
            made = schedule.created or now
            limit = max(DROUGHT, longest_gap(schedule, now) + _GRACE)
            # Of several schedules the strictest counts, from the time of the first one.
            other = due.get(dataset, Due(made, limit))
            due[dataset] = Due(min(made, other.since), min(limit, other.limit))
    return due


def take_trainings(
    runs: Iterable[FlowRun], parameters: Parameters, due: Mapping[str, Due], *, since: datetime
) -> list[FlowRun]:
    """Return the runs since a time, and older ones back to a successful one of each data set.

    `runs` come newest first, and are read no further than that. The data sets are those that are
    `due`, and those with a run since the time.
    """
    taken = list[FlowRun]()
    known = set(due)
    trained = set[str]()
    for run in runs:
        recent = (run.expected_start_time or since) >= since
        if not recent and known <= trained:
            break
        dataset = _dataset(run, parameters)
        if recent:
            known.add(dataset)
        if dataset in known:
            taken.append(run)
            trained |= {dataset} if _ended_well(run) else set()
    return taken


def describe_trainings(
    attempts: Iterable[FlowRun], parameters: Parameters, due: Mapping[str, Due]
) -> Iterator[Training]:
    """Yield the state of training on each data set that has a schedule, or had runs lately."""
    of_dataset = {dataset: list[FlowRun]() for dataset in due}
    for run in attempts:
        of_dataset.setdefault(_dataset(run, parameters), []).append(run)
    for dataset, runs in of_dataset.items():
        begun = [run.start_time or run.expected_start_time for run in runs]
        dates = [date for date in begun if date]
        well = [run.end_time for run in runs if _ended_well(run) and run.end_time]
        promise = due.get(dataset)
        yield Training(
            dataset=dataset,
            scheduled=promise is not None,
            since=min([*dates, *([promise.since] if promise else [])]),
            attempted=max(dates, default=None),
            succeeded=max(well, default=None),
            limit=promise.limit if promise else DROUGHT,
        )


def _dataset(run: FlowRun, parameters: Parameters) -> str:
    return str({**parameters.get(run.deployment_id, {}), **run.parameters}.get("dataset"))


def _ended_well(run: FlowRun) -> bool:
    return bool(run.state and run.state.is_completed() and run.state.name != OVERTAKEN)


def _find_idle(
    prefect: SyncPrefectClient, flows: Mapping[UUID, str], now: datetime
) -> tuple[IdleSchedule, ...]:
    """Return the active schedules without a future run, confirmed by a second read."""
    idle = tuple(_read_idle(prefect, flows, now))
    if idle:
        time.sleep(_SETTLE_SECONDS)
        idle = tuple(_read_idle(prefect, flows, now))
    return idle


def _read_idle(
    prefect: SyncPrefectClient, flows: Mapping[UUID, str], now: datetime
) -> Iterator[IdleSchedule]:
    ahead = _read_runs(
        prefect,
        expected_start_time=FlowRunFilterExpectedStartTime(after_=now),
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])),
    )
    making = {run.created_by.id for run in ahead if run.created_by}
    for deployment in _read_deployments(prefect):
        for schedule in _active(deployment):
            if schedule.id not in making and _is_due(schedule, now):
                made = FlowRunFilterCreatedBy(id_=[schedule.id])
                dates = [run.expected_start_time for run in _read_runs(prefect, created_by=made)]
                yield IdleSchedule(
                    deployment=f"{flows[deployment.flow_id]}/{deployment.name}",
                    schedule=schedule.slug or str(schedule.id),
                    changed=schedule.updated or now,
                    last=max((date for date in dates if date), default=None),
                )


def _is_due(schedule: DeploymentSchedule, now: datetime) -> bool:
    """Return True if a schedule has a date within the time for which the server makes runs."""
    return _next_date(schedule, now, now + _SCHEDULED_AHEAD) is not None


def longest_gap(schedule: DeploymentSchedule, now: datetime) -> timedelta:
    """Return the longest time between two dates of a schedule in the coming year.

    To within a day, where it has several dates on one day.
    """
    longest = timedelta()
    at = now
    while at < now + _GAPS_AHEAD:
        following = _next_date(schedule, at, now + _NEVER)
        if following is None:
            break
        longest = max(longest, following - at)
        # From right after that date, or by days: a dense schedule may have 100,000 dates a year.
        at = max(following + timedelta(microseconds=1), at + timedelta(days=1))
    return longest


def _next_date(schedule: DeploymentSchedule, start: datetime, end: datetime) -> datetime | None:
    from prefect.server.schemas import schedules

    # Only the server's classes, which have the names of the client's, compute dates.
    kind = getattr(schedules, type(schedule.schedule).__name__)
    dates = kind.model_validate(schedule.schedule.model_dump()).get_dates(1, start=start, end=end)
    # Prefect's own dates do not subtract to a plain timedelta.
    return next((datetime.fromtimestamp(d.timestamp(), UTC) for d in asyncio.run(dates)), None)
