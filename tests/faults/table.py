"""Plant every fault at every stage of the runs, and print how each pair ends.

    python -m tests.faults.table                       # every pair: an hour on two cores
    python -m tests.faults.table --part 4 --seed 7     # four of them, chosen by the seed

A pair has a data set of its own on a stack that it shares with those before it, and one fault. It
passes if the run recovered by itself or a person was told, nothing was lost, and the champion is
the right one. The exit code is 1 if a pair does not.
"""

import argparse
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Literal, NamedTuple
from uuid import UUID

from prefect.client.schemas.objects import FlowRun, State

from tasks.runs.states import GIVEN_UP
from tests.faults.bench import Bench, opened
from tests.faults.plant import Blow, Strike, Struck
from tests.faults.prepare import Template, train_template
from tests.faults.proxy import Kind, Mode
from tests.faults.stages import STAGES, find_problems

OUTAGE_SECONDS = 5.0
_MOST_SECONDS = 600.0
"""After which a run that has not ended counts as lost."""
_SUPERVISED_SECONDS = 90.0
"""Until a program that an outage has ended must have been started again."""
_TOLD_SECONDS = 120.0
"""A failure that nobody was told of by then is a silent one."""
_SETTLED_SECONDS = 3.0
"""A late report of a death may overwrite the state of a run until then."""
_LAST_REQUEST = 8

Ending = Literal["recovered", "told", "neither"]


_SERVICES: dict[Kind, str] = {"s3": "S3", "mlflow": "MLflow", "prefect": "Prefect"}
_MISBEHAVES: dict[Mode, str] = {
    "away": "away",
    "refusing": "refusing",
    "busy": "busy",
    "slow": "slow",
    "nonsense": "answering nonsense",
}


class Fault(NamedTuple):
    """What is planted: a blow to the process, or a service that misbehaves for some seconds."""

    blow: Blow
    kind: Kind = "s3"
    mode: Mode = "pass"


FAULTS: dict[str, Fault] = {
    "kill": Fault("kill"),
    "SIGTERM": Fault("terminate"),
    "out of memory": Fault("memory"),
    "disk full": Fault("disk"),
    **{
        f"{name} {word}": Fault("service", kind, mode)
        for kind, name in _SERVICES.items()
        for mode, word in _MISBEHAVES.items()
    },
}


class Pair(NamedTuple):
    """A fault, a stage, and the request of the stage's task before which it strikes."""

    fault: str
    stage: str
    request: int


@dataclass(frozen=True)
class Outcome:
    """How a pair ended."""

    pair: Pair
    ending: Ending
    state: str
    message: str
    seconds: float
    """From the fault to the end of the run."""
    again: float | None
    """From the fault until the run was going again; None if it did not have to begin anew."""
    problems: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether nobody has to be sorry."""
        return self.ending != "neither" and not self.problems


def choose_pairs(seed: int, part: int | None) -> list[Pair]:
    """Return every pair, or a part of them, each with a request from the seed."""
    chance = random.Random(seed)  # noqa: S311 - it chooses tests
    pairs = [
        Pair(fault, stage, chance.randrange(_LAST_REQUEST + 1))
        for fault in FAULTS
        for stage in STAGES
    ]
    return pairs if part is None else chance.sample(pairs, min(part, len(pairs)))


def run_pairs(root: Path, pairs: Sequence[Pair]) -> list[Outcome]:
    """Run pairs one after another on a stack of their own, and print each as it ends."""
    os.setpgrp()  # a process of its own, beyond a terminal's Ctrl-C: what began it passes that on
    with stopped_by(signal.SIGTERM), opened(root) as bench:
        _quiet_automations(bench)
        template, outcomes = train_template(bench), list[Outcome]()
        for number, pair in enumerate(pairs):
            outcomes.append(run_pair(bench, template, pair, f"pair-{number}"))
            print(line(outcomes[-1]), flush=True)
        return outcomes


def run_pair(bench: Bench, template: Template, pair: Pair, dataset: str) -> Outcome:
    """Prepare a data set, start the run, plant the fault once, and judge what came of it."""
    stage, fault = STAGES[pair.stage], FAULTS[pair.fault]
    trial = stage.begin(dataset, template)
    run = bench.run(stage.deployment, trial.parameters)
    if trial.clock_days:
        bench.plants.shift_clock(trial.clock_days, str(run))
    bench.plants.put(dataset, Strike(fault.blow, stage.task, pair.request, str(run)))
    struck = _wait_for_strike(bench, dataset, run)
    if fault.blow == "service" and struck:
        with bench.outage(fault.kind, fault.mode):
            bench.plants.go_on(dataset)
            time.sleep(OUTAGE_SECONDS)
    ended = bench.missing(_SUPERVISED_SECONDS)
    if ended:  # the pairs that follow need them
        bench.restart()
    found, _ = bench.wait(run, _has_ended, _MOST_SECONDS)
    told = _wait_for_message(bench, found)
    time.sleep(_SETTLED_SECONDS)
    problems = find_problems(bench, trial, run)
    problems += [f"the {name} ended, and nobody started it again" for name in ended]
    return _judge(pair, struck, found, bench.states(run), (problems, told))


def _judge(
    pair: Pair,
    struck: Struck | None,
    run: FlowRun,
    states: Sequence[State],
    found: tuple[list[str], int],
) -> Outcome:
    """Return how a pair ended, given the problems that were found and the failures told.

    What the server says last counts, not what it said at the end.
    """
    problems, told = found
    state, since = states[-1], struck.when if struck else states[0].timestamp.timestamp()
    if struck is None:
        problems = [f"the fault was never planted; {run.name} is {state.name}", *problems]
    if run.state and run.state.id != state.id:
        problems = [*problems, f"it ended as {run.state.name}, and then became {state.name}"]
    ending: Ending = "neither"
    if state.is_completed():
        ending = "recovered"
        if told:
            problems = [*problems, "a failure was told that was none"]
    elif told:
        ending = "told"
        if told > 1:
            problems = [*problems, f"it was told {told} times"]
    begun = [s.timestamp.timestamp() - since for s in states if s.is_running()]
    return Outcome(
        pair=pair,
        ending=ending,
        state=str(state.name),
        message=str(state.message),
        seconds=state.timestamp.timestamp() - since,
        again=next((seconds for seconds in begun if seconds > 0), None),
        problems=tuple(problems),
    )


def _wait_for_strike(bench: Bench, name: str, run: UUID) -> Struck | None:
    """Return when the fault struck; None if the run ended without it."""
    deadline = time.monotonic() + _MOST_SECONDS
    while time.monotonic() < deadline:
        if struck := bench.plants.struck(name):
            return struck
        if (state := bench.prefect.read_flow_run(run).state) and state.is_final():
            break
        time.sleep(0.05)
    return bench.plants.struck(name)


def _wait_for_message(bench: Bench, run: FlowRun) -> int:
    """Return how many messages call a run failed; one that ended well needs none."""
    deadline = time.monotonic() + _TOLD_SECONDS
    if run.state and not run.state.is_completed():
        while not bench.inbox.failures(str(run.id)) and time.monotonic() < deadline:
            time.sleep(0.2)
    return len(bench.inbox.failures(str(run.id)))


def _has_ended(run: FlowRun) -> bool:
    """Tell whether nothing more will come of a run: a crashed one is resumed, or given up."""
    state = run.state
    return bool(state and state.is_final() and (not state.is_crashed() or state.name == GIVEN_UP))


def _quiet_automations(bench: Bench) -> None:
    """Keep accepted batches from starting trainings that no pair is about."""
    for automation in bench.prefect.read_automations_by_name("train-on-accepted-batches"):
        bench.prefect.pause_automation(automation.id)


def line(outcome: Outcome) -> str:
    """Return one line of the table."""
    pair = outcome.pair
    again = f", going again after {outcome.again:.0f} s" if outcome.again is not None else ""
    words = [
        f"{'ok' if outcome.passed else 'FAILED':6} {pair.fault:26} {pair.stage:12}",
        f"request {pair.request}: {outcome.ending:9} {outcome.seconds:5.0f} s",
        f" {outcome.state}{again}",
    ]
    words += [f"\n       {problem}" for problem in outcome.problems]
    if outcome.ending != "recovered":
        words.append(f"\n       {outcome.message[:300]}")
    return "".join(words)


def summary(outcomes: Sequence[Outcome]) -> str:
    """Return the totals in two lines."""
    endings = [outcome.ending for outcome in outcomes]
    again = [outcome.again for outcome in outcomes if outcome.again is not None]
    lost = sum(bool(outcome.problems) for outcome in outcomes)
    resumed = f"median {median(again):.0f} s, most {max(again):.0f} s" if again else "none"
    return (
        f"{len(outcomes)} pairs of fault and stage: {endings.count('recovered')} recovered, "
        f"{endings.count('told')} told, {endings.count('neither')} neither; {lost} with something "
        f"lost or wrong.\nFrom the death of a process until the run was going again: {resumed}."
    )


@contextmanager
def stopped_by(*signals: signal.Signals) -> Iterator[None]:
    """Raise KeyboardInterrupt at the first of these signals; the next do not cut clean-up short."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        for number in signals:
            signal.signal(number, _ignore)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ignore(_number: int, _frame: FrameType | None) -> None:
    """Do nothing; unlike SIG_IGN, what is started meanwhile does not inherit it."""


def main() -> int:
    """Return 0 only if every pair passes, and 130 if it was stopped."""
    parser = argparse.ArgumentParser(description="Plant every fault at every stage.")
    parser.add_argument("--seed", type=int, default=0, help="chooses requests, and the part")
    parser.add_argument("--part", type=int, help="how many pairs; all if it is not given")
    parser.add_argument("--only", default="", help="only pairs that this pattern finds")
    parser.add_argument("--jobs", type=int, default=1, help="stacks that work side by side")
    words = parser.parse_args()
    pairs = [
        pair
        for pair in choose_pairs(words.seed, words.part)
        if re.search(words.only, f"{pair.fault} at {pair.stage}")
    ]
    try:
        with stopped_by(signal.SIGTERM, signal.SIGINT):
            outcomes = list(_run_side_by_side(pairs, max(1, words.jobs)))
    except KeyboardInterrupt:
        print("\nStopped, and with it every stack that it had started.")
        return 130
    print(f"\n{summary(outcomes)}")
    return 0 if all(outcome.passed for outcome in outcomes) else 1


def _run_side_by_side(pairs: Sequence[Pair], jobs: int) -> Iterator[Outcome]:
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    slices = [pairs[number::jobs] for number in range(jobs)]
    roots = [folder / str(number) for number in range(jobs)]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        try:
            for outcomes in pool.map(run_pairs, roots, slices):
                yield from outcomes
        except BaseException:
            # The pool waits for them, and they for nothing but the end of their pairs.
            for process in active_children():
                process.terminate()
            raise
    shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
