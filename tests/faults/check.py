"""Judge a recorded year: each promise, whether it was kept, and the figures that say so."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import numpy as np

from deployments.keep import GROWN
from tests.faults.record import Record, RunSeen

_UNFINISHED = {"SCHEDULED", "PENDING", "RUNNING", "CANCELLING", "CRASHED"}
_GIVEN_UP = "Given up"
_REFUSED = "Refused"
"""State of a form whose wish must not be done: the answer to a person, and no fault."""
_A_YEAR = 52
_MOST_GROWTH = 0.15
"""Of a server's memory from the second quarter of the year to the last."""
_OVERGROWN = 1.2
"""How much more than its limit the worker may have: it is replaced between two runs only."""
_MOST_BEND = 2.0
"""How much faster than in its first half something may grow in the second."""
_RESUMED_SECONDS = 180.0


@dataclass(frozen=True)
class Promise:
    """One thing that a year must keep."""

    name: str
    kept: bool
    found: str


def check(record: Record) -> list[Promise]:
    """Return every promise with what was found."""
    return [judge(record) for judge in _PROMISES]


def _no_week_missed(record: Record) -> Promise:
    """Each week's run ended well, by itself or as overtaken by one that did."""
    weekly = _weekly(record)
    due = {round(record.week(run.due)) for run in weekly}
    missing = sorted(set(range(record.weeks)) - due)
    failed, ends_well = list[str](), False
    trainings = [run for run in record.runs if run.flow == "train"]  # an event's overtake as well
    for run in sorted(trainings, key=lambda run: run.due, reverse=True):
        overtaken = run.last.name == "Overtaken"
        ends_well = ends_well if overtaken else run.last.type == "COMPLETED"
        if run in weekly and not ends_well:
            failed.append(f"week {record.week(run.due):.0f} ended as {run.last.name}")
    overtaken_weeks = sum(run.last.name == "Overtaken" for run in weekly)
    found = [f"{len(due)} of {record.weeks} weeks have a run, {overtaken_weeks} of them overtaken"]
    found += [f"week {week} has none" for week in missing] + failed[::-1]
    return Promise("no week missed", not missing and not failed, "; ".join(found))


def _every_image_once(record: Record) -> Promise:
    """What arrived is accepted, quarantined or waiting, once; nothing else is."""
    arrived = Counter(image for arrival in record.arrivals for image in arrival.images)
    there = Counter(
        [
            *record.whereabouts.accepted,
            *record.whereabouts.quarantined,
            *record.whereabouts.waiting,
        ]
    )
    lost, doubled = arrived - there, there - arrived
    where = record.whereabouts
    found = (
        f"{arrived.total():,} arrived: {len(where.accepted):,} accepted, "
        f"{len(where.quarantined):,} quarantined, {len(where.waiting):,} waiting; "
        f"{lost.total()} lost, {doubled.total()} doubled or unknown"
    )
    return Promise("every image once", not lost and not doubled, found)


def _good_and_bad_told_apart(record: Record) -> Promise:
    """Good batches are not in quarantine, bad ones are nowhere else."""
    bad = {arrival.name for arrival in record.arrivals if arrival.content != "good"}
    good = {arrival.name for arrival in record.arrivals} - bad
    accepted = set(record.whereabouts.accepted)
    wrongly_refused = sorted(good & set(record.refused))
    wrongly_accepted = [
        arrival.name
        for arrival in record.arrivals
        if arrival.content != "good" and accepted.intersection(arrival.images)
    ]
    found = f"{len(good)} good batches, {len(bad)} bad ones"
    if wrongly_refused:
        found += f"; refused though good: {', '.join(wrongly_refused)}"
    if wrongly_accepted:
        found += f"; accepted though bad: {', '.join(wrongly_accepted)}"
    return Promise("batches judged rightly", not wrongly_refused and not wrongly_accepted, found)


def _one_champion(record: Record) -> Promise:
    """From the first champion on there is always one, and the history explains each."""
    versions = [seen.version for seen in record.champions]
    first = next((place for place, version in enumerate(versions) if version), len(versions))
    gaps = versions[first:].count(None)
    moves = sum(move.action != "reject" for move in record.moves)
    steps = max(0, len(versions) - first)
    found = f"{steps} champions seen, {moves} moves; {gaps} times none"
    if record.history_problems:
        found += f"; {'; '.join(record.history_problems)}"
    whole = not record.history_problems and not gaps and steps <= moves
    return Promise("one champion, history whole", whole, found)


def _nothing_left(record: Record) -> Promise:
    """No run that was due is left waiting, pending, running or crashed."""
    left = [
        f"{run.flow} of week {record.week(run.due):.1f} is {run.last.name}"
        for run in record.runs
        if run.last.type in _UNFINISHED
        and run.last.name != _GIVEN_UP
        and record.week(run.due) < record.weeks
    ]
    return Promise("no run left", not left, "; ".join(left) or f"{len(record.runs)} runs ended")


def _nobody_left_in_the_dark(record: Record) -> Promise:
    """Each run that failed for good made one message, and each other failure none."""
    needed = Counter(
        run.id
        for run in record.runs
        for state in run.states
        if (state.type == "FAILED" or state.name == _GIVEN_UP) and state.name != _REFUSED
    )
    refused = Counter(run.id for run in record.runs for s in run.states if s.name == _REFUSED)
    told, false = Counter[str](), list[str]()
    for message in record.messages:
        if message.fields.get("type") != "failure":
            continue
        run = message.fields.get("run", "")
        told[run] += 1
        if run not in needed | refused:
            false.append(message.fields.get("subject", "a message"))
    silent = [run for run in needed if not told[run]]
    doubled = [run for run in needed if told[run] > needed[run]]
    found = (
        f"{needed.total()} faults for a person, {len(record.messages)} messages in all; "
        f"{len(silent)} silent, {len(doubled)} told more than once, {len(false)} false"
    )
    return Promise("every fault told, once", not silent and not doubled and not false, found)


def _quarantine_told(record: Record) -> Promise:
    """Each quarantined batch made a message."""
    silent = [
        batch
        for batch in record.refused
        if not any(batch in text for m in record.messages for text in m.fields.values())
    ]
    found = f"{len(record.refused)} quarantined, not told: {', '.join(silent) or 'none'}"
    return Promise("every quarantine told", not silent, found)


def _resumed_soon(record: Record) -> Promise:
    """From a death to the next beginning it takes three minutes at most."""
    waits = [wait for run in record.runs for wait in resumptions(run)]
    if not waits:
        return Promise("resumed within 3 minutes", kept=True, found="no run died")
    found = f"{len(waits)} deaths, median {median(waits):.0f} s, most {max(waits):.0f} s"
    return Promise("resumed within 3 minutes", max(waits) <= _RESUMED_SECONDS, found)


def resumptions(run: RunSeen) -> list[float]:
    """Return the seconds from each reported death of a run until it was running again."""
    waits, died = list[float](), None
    for state in run.states:
        if state.type == "CRASHED" and died is None:
            died = state.when
        elif state.type == "RUNNING" and died is not None:
            waits.append(state.when - died)
            died = None
    return waits


def _growth_linear(record: Record) -> Promise:
    """Store and databases grow no faster in the second half; retention brings the store down."""
    series = {"store": [sizes.store for sizes in record.sizes]}
    for name in record.retained.databases:
        series[name] = [sizes.databases.get(name, 0) for sizes in record.sizes]
    bends = {name: _bend(values) for name, values in series.items()}
    last = record.sizes[-1].store
    down = record.retained.store < last
    found = ", ".join(f"{name} {values[-1] / 1e6:.0f} MB" for name, values in series.items())
    found += f"; second half to first {', '.join(f'{n} {b:.1f}' for n, b in bends.items())}"
    found += f"; retention: store {last / 1e6:.0f} to {record.retained.store / 1e6:.0f} MB"
    kept = down and all(bend <= _MOST_BEND for bend in bends.values())
    return Promise("growth linear, retention works", kept, found)


def _bend(values: list[int]) -> float:
    """Return how much faster something grew in the second half than in the first."""
    if len(values) < 4:  # of halves that short nothing can be said
        return 1.0
    begun, middle, end = values[len(values) // 8], values[len(values) // 2], values[-1]
    before = (middle - begun) / (len(values) // 2 - len(values) // 8)
    after = (end - middle) / (len(values) - 1 - len(values) // 2)
    return after / before if before > 0 else 1.0


def _memory_flat(record: Record) -> Promise:
    """No server grows: the last quarter needs no more than the second one.

    The worker does, and is replaced for that: it never has much more than its limit.
    """
    quarter = max(1, len(record.sizes) // 4)
    growths = {}
    for name in record.retained.memory.keys() - {"worker"}:
        values = [sizes.memory.get(name, 0) for sizes in record.sizes]
        early, late = values[quarter : 2 * quarter], values[-quarter:]
        early, late = [v for v in early if v], [v for v in late if v]
        if early and late:
            growths[name] = float(np.median(late) / np.median(early) - 1)
    worker = max((sizes.memory.get("worker", 0) for sizes in record.sizes), default=0)
    found = [f"{name} {growth:+.0%}" for name, growth in sorted(growths.items())]
    found += [f"worker at most {worker / 2**20:.0f} MiB"]
    flat = all(growth <= _MOST_GROWTH for growth in growths.values())
    return Promise("memory flat", flat and worker < GROWN * _OVERGROWN, ", ".join(found))


def _faults_planted(record: Record) -> Promise:
    """Enough faults did strike: a hundred in a whole year, one a week in a part of one."""
    kinds = Counter(fault.name.split(" in ")[0] for fault in record.faults)
    found = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    enough = 100 if record.weeks >= _A_YEAR else record.weeks
    return Promise(f"{len(record.faults)} faults planted", len(record.faults) >= enough, found)


def _machinery(record: Record) -> Promise:
    """The year's own hands did all that they had to."""
    return Promise("the plan was carried out", not record.mishaps, "; ".join(record.mishaps))


def _weekly(record: Record) -> list[RunSeen]:
    return [
        run
        for run in record.runs
        if run.flow == "train"
        and run.scheduled
        and -0.5 < record.week(run.due) < record.weeks - 0.5
    ]


_PROMISES: tuple[Callable[[Record], Promise], ...] = (
    _no_week_missed,
    _every_image_once,
    _good_and_bad_told_apart,
    _one_champion,
    _nothing_left,
    _nobody_left_in_the_dark,
    _quarantine_told,
    _resumed_soon,
    _growth_linear,
    _memory_flat,
    _faults_planted,
    _machinery,
)
