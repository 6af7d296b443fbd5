"""Live a year in minutes, on real servers, by the real schedule, and judge it.

    python -m tests.faults.year                       # 52 weeks
    python -m tests.faults.year --weeks 3 --seed 7    # a short one

Prints every promise and what was found, and leaves the time line, year.png, in .stack/year, beside
the record, year.json, from which it can be judged and drawn again. The exit code is 1 if a promise
is broken.
"""

import argparse
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from deployments.stack import PROJECT
from tests.faults.bench import opened
from tests.faults.check import Promise, check
from tests.faults.draw import draw
from tests.faults.live import live
from tests.faults.plan import plan_year
from tests.faults.record import Record

OUT = PROJECT / ".stack" / "year"
SECONDS_A_WEEK = 45.0
"""52 weeks in 42 minutes, the start of the servers included. A training and its servers take a
minute of a core, most of it to import libraries, to evaluate and to draw: at 22 seconds two cores
fall behind, and most runs end as overtaken.
"""


def live_year(root: Path, seed: int, weeks: int, interval: float) -> Record:
    """Live a planned year on a stack of its own under a folder."""
    with opened(root) as bench:
        return live(bench, plan_year(seed, weeks), interval)


def report(promises: Sequence[Promise]) -> str:
    """Return a line for each promise."""
    width = max(len(promise.name) for promise in promises)
    return "\n".join(
        f"{'kept' if promise.kept else 'BROKEN':7} {promise.name:{width}}  {promise.found}"
        for promise in promises
    )


def main() -> int:
    """Return 0 only if every promise was kept."""
    parser = argparse.ArgumentParser(description="Live a year in minutes and judge it.")
    parser.add_argument("--weeks", type=int, default=52)
    parser.add_argument("--seed", type=int, default=0, help="plans arrivals, faults and people")
    parser.add_argument("--interval", type=float, default=SECONDS_A_WEEK, help="seconds a week")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of picture and record")
    parser.add_argument("--record", type=Path, help="judge and draw this record, and live nothing")
    words = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what ends us ends our servers
    begun = time.monotonic()
    words.out.mkdir(parents=True, exist_ok=True)
    if words.record:
        record = Record.model_validate_json(words.record.read_text())
    else:
        root = Path(tempfile.mkdtemp(prefix="year-"))
        record = live_year(root, words.seed, words.weeks, words.interval)
        (words.out / "year.json").write_text(record.model_dump_json(indent=1))
        shutil.rmtree(root)
    draw(record, words.out / "year.png")
    promises = check(record)
    print(report(promises))
    kept = sum(promise.kept for promise in promises)
    minutes = (time.monotonic() - begun) / 60
    print(
        f"\n{record.weeks} weeks, seed {record.seed}, {len(record.faults)} faults: "
        f"{kept} of {len(promises)} promises kept in {minutes:.1f} minutes; "
        f"the time line is {words.out / 'year.png'}"
    )
    return 0 if kept == len(promises) else 1


if __name__ == "__main__":
    sys.exit(main())
