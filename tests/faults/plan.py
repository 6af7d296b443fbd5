"""A year, planned from a seed: what arrives, what breaks, and what a person does, week by week."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from tests.faults.plant import Blow
from tests.faults.proxy import Kind, Mode

Batch = Literal["good", "shuffled labels", "inverted"]
Service = Literal["worker", "S3 server", "MLflow server", "Prefect server"]

GOOD_LEVELS, GOOD_PARTS = 8, 8
"""So many shades of ink, and disjoint parts of the training images: each pair is a good batch."""

FAULTS_A_WEEK = 2

TASKS = (
    *("check_services", "take_snapshot", "validate_snapshot", "find_arrivals", "ingest_batch"),
    *("train_model", "evaluate_models", "decide_promotion", "register_candidate", "set_champion"),
    *("report_decision", "publish_cards"),
)
"""Where a run may be struck; a run that has no such task passes the blow on to the next."""


@dataclass(frozen=True)
class Arrival:
    """A batch that is dropped."""

    week: int
    at: float
    """Part of the week, from 0 to 1."""
    name: str
    content: Batch
    piece: int
    """Which of the good batches it is, or of whose images it is spoiled."""
    marked_after: float = 0.0
    """Weeks after which the marker follows; 0: with the batch. Until then it waits."""


@dataclass(frozen=True)
class BlowToRun:
    """A fault inside the next run of train/weekly that gets to a task."""

    week: int
    at: float
    fault: Blow
    task: str
    request: int

    @property
    def name(self) -> str:
        """What the time line calls it."""
        return f"{self.fault} in {self.task}"


@dataclass(frozen=True)
class Outage:
    """A service that misbehaves, as its clients see it."""

    week: int
    at: float
    kind: Kind
    mode: Mode
    seconds: float

    @property
    def name(self) -> str:
        """What the time line calls it."""
        return f"{self.kind} {self.mode}"


@dataclass(frozen=True)
class Death:
    """A program of the stack is killed; whoever keeps the stack alive starts it again."""

    week: int
    at: float
    service: Service

    @property
    def name(self) -> str:
        """What the time line calls it."""
        return f"{self.service} killed"


@dataclass(frozen=True)
class ClockJump:
    """The clock of the next run's tasks is wrong by so many hours."""

    week: int
    at: float
    hours: float

    @property
    def name(self) -> str:
        """What the time line calls it."""
        return f"clock {self.hours:+.0f} h"


Fault = BlowToRun | Outage | Death | ClockJump


@dataclass(frozen=True)
class Rollback:
    """A person rolls back to the previous champion."""

    week: int
    at: float


@dataclass(frozen=True)
class Year:
    """Everything that will happen, in no order."""

    seed: int
    weeks: int
    arrivals: tuple[Arrival, ...]
    faults: tuple[Fault, ...]
    rollbacks: tuple[Rollback, ...]
    approves: tuple[bool, ...]
    """What a person says to the first offer, the second, and so on: approve, or else reject."""


def plan_year(seed: int, weeks: int) -> Year:
    """Return the same year for the same seed."""
    chance = random.Random(seed)  # noqa: S311 - a plan, not a secret
    third = max(1, weeks // 3)
    return Year(
        seed=seed,
        weeks=weeks,
        arrivals=tuple(_arrivals(chance, weeks)),
        faults=tuple(
            _fault(chance, week, chance.random())
            for week in range(weeks)
            # Some meet no run; with these more than a hundred strike in a year.
            for _ in range(FAULTS_A_WEEK + (week % 8 == 0))
        ),
        rollbacks=tuple(
            Rollback(week, chance.random()) for week in sorted({third, min(2 * third, weeks - 1)})
        ),
        approves=tuple(chance.random() < 0.5 for _ in range(weeks)),
    )


def _arrivals(chance: random.Random, weeks: int) -> Iterator[Arrival]:
    """Two weeks of three bring a batch; some of these are bad, some come late."""
    pieces = list(range(GOOD_LEVELS * GOOD_PARTS))
    chance.shuffle(pieces)
    for week in range(weeks):
        kind = chance.choices(("good", "late", "bad", "nothing"), (5, 1, 2, 3))[0]
        piece, at = pieces[week % len(pieces)], chance.random()
        if kind == "good":
            yield Arrival(week, at, f"week-{week:02}", "good", piece)
        elif kind == "late":
            yield Arrival(week, at, f"late-{week:02}", "good", piece, chance.uniform(0.5, 1.5))
        elif kind == "bad":
            content: Batch = chance.choice(("shuffled labels", "inverted"))
            yield Arrival(week, at, f"bad-{week:02}", content, piece)


def _fault(chance: random.Random, week: int, at: float) -> Fault:
    """Draw one fault; those that only a person can mend are the rarest."""
    seconds = chance.uniform(2, 6)
    kind = chance.choices(("blow", "outage", "death", "clock"), (5, 6, 2, 1))[0]
    if kind == "blow":
        blows: tuple[Blow, ...] = ("kill", "terminate", "memory", "disk")
        blow = chance.choices(blows, (5, 3, 1, 1))[0]
        return BlowToRun(week, at, blow, chance.choice(TASKS), chance.randrange(6))
    if kind == "outage":
        where: tuple[Kind, ...] = ("s3", "mlflow", "prefect")
        modes: tuple[Mode, ...] = ("away", "slow", "busy")
        return Outage(week, at, chance.choice(where), chance.choice(modes), seconds)
    if kind == "death":
        services: tuple[Service, ...] = ("worker", "S3 server", "MLflow server", "Prefect server")
        return Death(week, at, chance.choice(services))
    return ClockJump(week, at, chance.choice((-24.0, -1.0, 1.0, 24.0)))
