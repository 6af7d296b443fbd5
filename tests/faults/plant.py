"""Faults inside flow runs: what is planted, where, and whether it has struck.

A strike is a file in a folder that the processes of flow runs look into; hook/sitecustomize.py is
the other half.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

HOOK = Path(__file__).parent / "hook"
"""What has to stand on the worker's PYTHONPATH."""

Blow = Literal["kill", "terminate", "memory", "disk", "service"]


@dataclass(frozen=True)
class Strike:
    """A fault at a place of a run."""

    fault: Blow
    task: str
    request: int
    """It strikes before this request of the task to S3 or MLflow, from 0, or at the task's end."""
    run: str | None = None
    """Id of the flow run; None: whichever gets to the task first."""


@dataclass(frozen=True)
class Struck:
    """What is known of a strike that happened."""

    run: str
    when: float
    """Seconds since the epoch."""


class Plants:
    """The folder of strikes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def environment(self) -> dict[str, str]:
        """Return the variables that a worker needs, so that its runs find strikes."""
        path = os.pathsep.join(filter(None, [str(HOOK), os.environ.get("PYTHONPATH")]))
        return {"FAULTS_FOLDER": str(self.folder), "PYTHONPATH": path}

    def put(self, name: str, strike: Strike) -> None:
        """Plant a strike, whole or not at all."""
        draft = self.folder / f"{name}.draft"
        draft.write_text(json.dumps(asdict(strike)))
        draft.rename(self.folder / f"{name}.strike")

    def withdraw(self, name: str) -> bool:
        """Take back a strike that has not happened; False if it has."""
        try:
            (self.folder / f"{name}.strike").unlink()
        except FileNotFoundError:
            return False
        return True

    def struck(self, name: str) -> Struck | None:
        """Return when and in which run a strike happened; None if it has not."""
        try:
            run, when = (self.folder / f"{name}.by").read_text().split()
        except (FileNotFoundError, ValueError):  # not yet, or half written
            return None
        return Struck(run, float(when))

    def go_on(self, name: str) -> None:
        """Let the run go on that waits for its service to be switched."""
        (self.folder / f"{name}.ready").touch()

    def shift_clock(self, days: float, run: str = "next") -> None:
        """Let the clock of a run, or of the next one, be wrong by so many days for its tasks."""
        draft = self.folder / f"{run}.clock.draft"
        draft.write_text(str(days))
        draft.rename(self.folder / f"{run}.clock")
