"""Live through a planned year on real servers, and record what happens."""

import os
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any
from uuid import UUID

import httpx
import numpy as np
import psutil
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import PrefectHTTPStatusError
from prefect.states import AwaitingRetry

from deployments.services import BUCKET
from deployments.stack import StackError
from deployments.tour import begin
from expectations.image_table import image_table
from mnist_cnn.digits import Digits
from mnist_cnn.promotion import PromotionPolicy
from tasks import keys
from tasks.arrivals.batch_files import MARKER, parse_batch, write_parquet
from tasks.datasets.ledger import (
    folder_of,
    present_snapshot,
    read_base,
    read_ledger,
)
from tasks.datasets.snapshots import read_split
from tasks.registry.history import read_history, trace
from tasks.registry.versions import read_model, read_versions
from tasks.runs.states import GIVEN_UP
from tasks.runs.turn import TAG
from tasks.services.s3 import DEFAULT_STORE, StorageUnreachable, Store
from tests.faults.bench import SERVICES, Bench
from tests.faults.plan import (
    GOOD_PARTS,
    Arrival,
    BlowToRun,
    ClockJump,
    Death,
    Fault,
    Outage,
    Rollback,
    Year,
)
from tests.faults.plant import Strike
from tests.faults.prepare import PARTS, POLICY, TRAINING
from tests.faults.record import (
    ActSeen,
    ArrivalSeen,
    ChampionSeen,
    FaultSeen,
    MessageSeen,
    MoveSeen,
    Record,
    RunSeen,
    Sizes,
    StateSeen,
    Whereabouts,
)

DATASET = "year"
MODEL = f"{DATASET}-cnn"
_LOOK_SECONDS = 1.0
_SCHEDULING_SECONDS = 90.0
"""Within which the scheduler has made the runs of a new schedule."""
_END_SECONDS = 600.0
"""After the last week, until every run must have ended."""
_REVIVED_SECONDS = 180.0
_AGE = """
UPDATE flow_run_state
SET timestamp = strftime('%Y-%m-%d %H:%M:%f', timestamp, '-1 hour')
WHERE type = 'SCHEDULED'
"""
_WATCH_TAG = "watch"
_PAGE = 200
_ACTIVE = [
    *(StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING),
    *(StateType.CANCELLING, StateType.CRASHED),
]
_RETENTION_DAYS = 100.0
_AWAY = (
    httpx.HTTPError,
    PrefectHTTPStatusError,
    MlflowException,
    StorageUnreachable,
    ConnectionError,
)
"""What a person sees of a service that was just killed: they try again a little later."""

YEAR_POLICY: PromotionPolicy = POLICY.model_copy(update={"class_margin": 0.3})
"""With thirty images of a digit this is proved less and less often: then a person is asked."""


@dataclass
class Life:
    """A year that goes on: its servers, its plan, and what was seen so far."""

    bench: Bench
    year: Year
    interval: float
    begun: float
    faults: list[FaultSeen] = field(default_factory=list)
    arrivals: list[ArrivalSeen] = field(default_factory=list)
    champions: list[ChampionSeen] = field(default_factory=list)
    acts: list[ActSeen] = field(default_factory=list)
    sizes: list[Sizes] = field(default_factory=list)
    mishaps: list[str] = field(default_factory=list)
    answered: set[str] = field(default_factory=set)
    """Versions that the person has judged, and states of runs that they have repeated."""
    repeats: Counter[str] = field(default_factory=Counter)
    """How often the person has repeated a run."""
    locks: dict[str, Lock] = field(default_factory=dict)

    def act(self, what: str) -> None:
        """Note what the person did."""
        self.acts.append(ActSeen(when=time.time(), what=what))


def live(bench: Bench, year: Year, interval: float) -> Record:
    """Begin a data set, let the schedule run its weeks, and do to it what the plan says."""
    begin(DATASET, PARTS)
    life = Life(bench, year, interval, begun=time.time() + max(interval, _SCHEDULING_SECONDS))
    life.locks = {name: Lock() for name in ("machine", "s3", "mlflow", "prefect")}
    schedules = _schedule(life)
    _age_schedule(life)
    agenda = sorted(_agenda(life), key=lambda entry: entry[0])
    end = life.begun + year.weeks * interval
    with ThreadPoolExecutor(16, "year") as hands:
        while (now := time.time()) < end:
            while agenda and agenda[0][0] <= now:
                hands.submit(_try, life, agenda.pop(0)[1])
            _look(life)
            time.sleep(_LOOK_SECONDS)
        for remaining in agenda:
            hands.submit(_try, life, remaining[1])
    _try(life, lambda: _stop_schedules(bench, schedules))
    _wait_for_the_end(life)
    life.sizes.append(_sizes(bench))
    ended = time.time()
    return _record(life, ended, _retain(life))


def _agenda(life: Life) -> Iterator[tuple[float, Callable[[], None]]]:
    """Return when to do what."""

    def when(week: int, at: float) -> float:
        return life.begun + (week + at) * life.interval

    for arrival in life.year.arrivals:
        at = when(arrival.week, arrival.at)
        yield at, partial(_drop, life, arrival)
        if arrival.marked_after:
            later = at + arrival.marked_after * life.interval
            yield later, partial(_mark, arrival)
    for number, fault in enumerate(life.year.faults):
        yield when(fault.week, fault.at), partial(_plant, life, number, fault)
    for rollback in life.year.rollbacks:
        yield when(rollback.week, rollback.at), partial(_roll_back, life, rollback)
    for week in range(life.year.weeks):
        yield when(week, 0), lambda: life.sizes.append(_sizes(life.bench))


def _try(life: Life, work: Callable[[], None], attempts: int = 20) -> None:
    """Do something, and again while a service is away; a mishap of ours is noted, never lost."""
    for left in reversed(range(attempts)):
        try:
            return work()
        except _AWAY as error:
            if left == 0:
                life.mishaps.append(f"{type(error).__name__}: {error}")
            time.sleep(_LOOK_SECONDS)
        except Exception as error:  # noqa: BLE001 - in a thread nobody would see it
            life.mishaps.append(f"{type(error).__name__}: {error}")
            return None
    return None


def _schedule(life: Life) -> list[tuple[Any, Any]]:
    """Let train/weekly be due each week, and ingest/nightly every fourth, between two weeks."""
    begun, week = datetime.fromtimestamp(life.begun, UTC), timedelta(seconds=life.interval)
    wanted = {
        "train/weekly": (
            IntervalSchedule(interval=week, anchor_date=begun),
            {
                "dataset": DATASET,
                "training": TRAINING.model_dump(exclude_unset=True),
                "promotion": YEAR_POLICY.model_dump(exclude_defaults=True),
            },
        ),
        "ingest/nightly": (
            IntervalSchedule(interval=4 * week, anchor_date=begun + week / 2),
            {},
        ),
    }
    made = []
    for deployment, (schedule, parameters) in wanted.items():
        found = life.bench.prefect.read_deployment_by_name(deployment)
        for standing in found.schedules:  # the machine may live through a real Monday
            life.bench.prefect.update_deployment_schedule(found.id, standing.id, active=False)
        entry = DeploymentScheduleCreate(schedule=schedule, parameters=parameters, slug=DATASET)
        (ours,) = life.bench.prefect.create_deployment_schedules(found.id, [entry])
        made.append((found.id, ours.id))
    return made


def _age_schedule(life: Life) -> None:
    """Let the scheduled runs have been made an hour ago, as those of a real week are days before.

    Prefect lets the events of a run that was scheduled less than five minutes before it began wait
    for the event of its scheduling, which a scheduler never sends, for fifteen minutes.
    """
    while not any(run.auto_scheduled and "training" in run.tags for run in _runs(life.bench)):
        if time.time() > life.begun:
            raise RuntimeError("the scheduler has made no run before the first was due")
        time.sleep(_LOOK_SECONDS)
    with closing(sqlite3.connect(_prefect_database(life.bench), timeout=30)) as database:
        database.execute(_AGE)
        database.commit()


def _prefect_database(bench: Bench) -> Path:
    """Return the path of the database of Prefect's server."""
    return bench.stack.root / "prefect-home" / "prefect.db"


def _stop_schedules(bench: Bench, schedules: list[tuple[Any, Any]]) -> None:
    for deployment, schedule in schedules:
        bench.prefect.update_deployment_schedule(deployment, schedule, active=False)


def _drop(life: Life, arrival: Arrival) -> None:
    digits = _content(arrival)
    store, folder = Store(DEFAULT_STORE), keys.incoming(DATASET, arrival.name)
    store.put(f"{folder}part.parquet", write_parquet(digits))
    if not arrival.marked_after:
        store.put(f"{folder}{MARKER}", b"")
    life.arrivals.append(
        ArrivalSeen(
            name=arrival.name,
            content=arrival.content,
            when=time.time(),
            late=bool(arrival.marked_after),
            images=_digests(digits),
        )
    )


def _mark(arrival: Arrival) -> None:
    store = Store(DEFAULT_STORE)
    if store.names(keys.incoming(DATASET, arrival.name)):
        store.put(keys.incoming(DATASET, arrival.name, MARKER), b"")


def _content(arrival: Arrival) -> Digits:
    """Return images that nobody has seen: a part of the training images in a shade of its own."""
    level, part = divmod(arrival.piece, GOOD_PARTS)
    size = len(PARTS.train) // GOOD_PARTS
    digits = PARTS.train.part(part * size, (part + 1) * size)
    images = (digits.images * (1 - (1 + level) / 100)).astype(np.uint8)
    if arrival.content == "inverted":
        images = 255 - images
    labels = digits.labels
    if arrival.content == "shuffled labels":
        labels = np.random.default_rng(arrival.piece).permutation(labels)
    return Digits(images, labels)


def _digests(digits: Digits) -> list[str]:
    return [str(digest) for digest in image_table(digits.images, digits.labels)["digest"]]


def _plant(life: Life, number: int, fault: Fault) -> None:
    if isinstance(fault, BlowToRun):
        strike = Strike(fault.fault, fault.task, fault.request)
        life.bench.plants.put(f"{number:03}", strike)
    elif isinstance(fault, ClockJump):
        life.bench.plants.shift_clock(fault.hours / 24)
        _note(life, fault.name, time.time())
    elif isinstance(fault, Outage):
        with life.locks[fault.kind]:
            begun = time.time()
            with life.bench.outage(fault.kind, fault.mode):
                time.sleep(fault.seconds)
            _note(life, fault.name, begun)
    elif isinstance(fault, Death):
        _kill(life, fault)


def _kill(life: Life, fault: Death) -> None:
    """Kill a program, and wait until the stack's keeper has started it again."""
    with life.locks["machine"]:
        begun = time.time()
        killed = life.bench.service(fault.service)
        for process in killed:
            process.kill()
        psutil.wait_procs(killed, timeout=_REVIVED_SECONDS)
        if missing := life.bench.missing(_REVIVED_SECONDS):
            raise StackError(f"{', '.join(missing)} did not come back")
        _note(life, fault.name, begun)


def _note(life: Life, name: str, begun: float, run: str | None = None) -> None:
    life.faults.append(FaultSeen(name=name, when=begun, until=time.time(), run=run))


def _look(life: Life) -> None:
    """See who is champion, and let the person do what is theirs; a service that is away waits."""
    try:
        aliases = _aliases()
        _see_champion(life, aliases.get("champion"))
        _answer_offer(life, aliases.get("challenger"))
        _repeat_failed(life)
    except _AWAY:
        return


def _aliases() -> dict[str, str]:
    try:
        return dict(MlflowClient().get_registered_model(MODEL).aliases)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return {}
        raise


def _see_champion(life: Life, version: str | None) -> None:
    seen = str(version) if version else None
    if not life.champions or life.champions[-1].version != seen:
        life.champions.append(ChampionSeen(when=time.time(), version=seen))


def _answer_offer(life: Life, challenger: str | None) -> None:
    """Approve or reject a version that awaits approval, as the plan says of this offer."""
    if challenger is None or f"version {challenger}" in life.answered:
        return
    offers = sum(answer.startswith("version") for answer in life.answered)
    judgement = "approve" if life.year.approves[offers % len(life.year.approves)] else "reject"
    life.bench.run(
        "promote/manual",
        {
            "judgement": judgement,
            "version": int(challenger),
            "model": MODEL,
            "reason": "the person of the year has looked at it",
            "who": "the person of the year",
        },
    )
    life.answered.add(f"version {challenger}")
    life.act(f"{judgement} {challenger}")


def _repeat_failed(life: Life) -> None:
    """Repeat a run that failed, as the person does who was told of it."""
    for run in _runs(life.bench, [StateType.FAILED, StateType.CRASHED]):
        state = run.state
        failed = state and (state.is_failed() or state.name == GIVEN_UP)
        if not state or not failed or state.name == "Refused" or str(state.id) in life.answered:
            continue
        if len(life.bench.inbox.failures(str(run.id))) <= life.repeats[str(run.id)]:
            continue  # nobody has told them yet
        message = "The person of the year has read what went wrong, and repeats it."
        life.bench.prefect.set_flow_run_state(run.id, AwaitingRetry(message=message), force=True)
        life.answered.add(str(state.id))
        life.repeats[str(run.id)] += 1
        life.act(f"repeat {run.name}")


def _roll_back(life: Life, _rollback: Rollback) -> None:
    """Roll back once there is something to roll back to."""
    deadline = time.time() + life.interval * life.year.weeks
    while "previous" not in _aliases():
        if time.time() > deadline:
            raise RuntimeError("there was never a previous champion to roll back to")
        time.sleep(_LOOK_SECONDS)
    words = {"model": MODEL, "reason": "a wish of the year", "who": "the person of the year"}
    life.bench.run("promote/rollback", words)
    life.act("roll back")


def _wait_for_the_end(life: Life) -> None:
    """Go on looking until every run has ended, or must have."""
    deadline = time.time() + _END_SECONDS
    quiet = 0
    while time.time() < deadline and quiet < 10:
        _look(life)
        quiet = 0 if _active(life.bench) else quiet + 1
        time.sleep(_LOOK_SECONDS)


def _active(bench: Bench) -> list[FlowRun]:
    """Return the runs of the year that are due and have not ended."""
    now = datetime.now(UTC)
    return [
        run
        for run in _runs(bench, _ACTIVE)
        if run.state
        and (not run.state.is_final() or (run.state.is_crashed() and run.state.name != GIVEN_UP))
        and (run.expected_start_time is None or run.expected_start_time <= now)
    ]


def _runs(bench: Bench, types: list[StateType] | None = None) -> list[FlowRun]:
    """Return all runs but those that watch over the others, or those in states of some types."""
    ours = FlowRunFilter(
        tags=FlowRunFilterTags(all_=[TAG]),
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=types)) if types else None,
    )
    found = list[FlowRun]()
    while page := bench.prefect.read_flow_runs(
        flow_run_filter=ours,
        sort=FlowRunSort.EXPECTED_START_TIME_ASC,
        limit=_PAGE,
        offset=len(found),
    ):
        found += page
        if len(page) < _PAGE:
            break
    return [run for run in found if _WATCH_TAG not in run.tags]


def _retain(life: Life) -> Sizes:
    """Remove what is old, on a day when everything is."""
    bench = life.bench
    run = bench.run("retain/weekly", {"dry_run": False})
    bench.plants.shift_clock(_RETENTION_DAYS, str(run))
    found, ended = bench.wait(run, lambda run: bool(run.state and run.state.is_final()), 300)
    if not ended or not (found.state and found.state.is_completed()):
        life.mishaps.append(f"retention ended as {found.state}")
    return _sizes(bench)


def _sizes(bench: Bench) -> Sizes:
    root = bench.stack.root
    memory = {}
    for name in SERVICES:
        memory[name] = 0
        for process in bench.service(name):
            try:
                memory[name] += process.memory_info().rss
            except psutil.NoSuchProcess:  # it was just killed
                continue
    databases = {"mlflow": root / "mlflow.db", "prefect": _prefect_database(bench)}
    return Sizes(
        when=time.time(),
        store=_size_of(root / "s3" / BUCKET),
        databases={n: path.stat().st_size for n, path in databases.items() if path.exists()},
        memory=memory,
    )


def _size_of(folder: Path) -> int:
    """Return the bytes of all files under a folder, in which others write and remove."""
    size = 0
    for place, _, names in os.walk(folder):  # which passes over a folder that is gone
        for name in names:
            with suppress(FileNotFoundError):
                size += Path(place, name).stat().st_size
    return size


def _record(life: Life, ended: float, retained: Sizes) -> Record:
    store = Store(DEFAULT_STORE)
    versions = read_versions(MODEL)
    history = read_history(store, MODEL, versions, restore=False)
    _, unexplained = trace(history.moves, read_model(MODEL).aliases.get("champion"))
    flows = {flow.id: flow.name for flow in life.bench.prefect.read_flows()}
    inbox = life.bench.inbox
    return Record(
        seed=life.year.seed,
        weeks=life.year.weeks,
        interval=life.interval,
        begun=life.begun,
        ended=ended,
        runs=[_run_seen(life.bench, run, flows) for run in _runs(life.bench)],
        faults=[*life.faults, *_blows(life)],
        arrivals=life.arrivals,
        whereabouts=_whereabouts(store),
        refused=[verdict.batch for verdict in read_ledger(store, DATASET) if not verdict.accepted],
        champions=life.champions,
        moves=[
            MoveSeen(
                when=move.when.timestamp(),
                action=move.action,
                version=move.to_version,
                who=move.who,
            )
            for move in history.moves
        ],
        history_problems=[*history.problems, *unexplained],
        messages=[
            MessageSeen(when=when, fields={name: str(text) for name, text in fields.items()})
            for when, fields in zip(inbox.times, list(inbox.received), strict=False)
        ],
        acts=life.acts,
        sizes=life.sizes,
        retained=retained,
        mishaps=life.mishaps,
    )


def _run_seen(bench: Bench, run: FlowRun, flows: Mapping[UUID, str]) -> RunSeen:
    due = run.expected_start_time
    return RunSeen(
        id=str(run.id),
        flow=flows[run.flow_id],
        due=due.timestamp() if due else 0.0,
        scheduled=run.auto_scheduled,
        message=str(run.state and run.state.message),
        states=[
            StateSeen(when=s.timestamp.timestamp(), type=s.type.value, name=str(s.name))
            for s in bench.states(run.id)
        ],
    )


def _blows(life: Life) -> Iterator[FaultSeen]:
    """Return the blows that struck; one that met no run of its task did not."""
    for number, fault in enumerate(life.year.faults):
        struck = life.bench.plants.struck(f"{number:03}")
        if isinstance(fault, BlowToRun) and struck:
            yield FaultSeen(name=fault.name, when=struck.when, until=struck.when, run=struck.run)


def _whereabouts(store: Store) -> Whereabouts:
    """Read every image back from where it lies."""
    ledger, base = read_ledger(store, DATASET), read_base(store, DATASET)
    if base is None:
        raise RuntimeError("the data set has not begun: not one run came as far as its intake")
    grown = read_split(present_snapshot(store, base, ledger), "train")
    arrived = grown.part(base.images("train"), len(grown))
    refused = [verdict for verdict in ledger if not verdict.accepted]
    return Whereabouts(
        accepted=_digests(arrived) if len(arrived) else [],
        quarantined=[d for v in refused for d in _images_under(store, folder_of(v, "files/"))],
        waiting=_images_under(store, keys.incoming(DATASET)),
    )


def _images_under(store: Store, folder: str) -> list[str]:
    found = []
    for name in store.names(folder):
        if name.endswith(".parquet"):
            raw = parse_batch({"part.parquet": store.get(name)})
            found += _digests(Digits(raw.images, raw.labels))
    return found
