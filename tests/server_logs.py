"""Errors in the logs of a stack's servers and worker, which no test looked at."""

import re
from collections.abc import Iterator
from pathlib import Path

from deployments.services import Stack

ALLOWED = {
    r"\| (Flow|Task) run '": "a run's own log, which the worker copies: tests plant faults in runs",
    r"Dir\.Remove not empty": "rclone tries to remove the folder of each removed object",
    r"UNIQUE constraint failed: concurrency_limit_v2.name": "two runs make one lock: Prefect "
    "answers 409 to the later one, which then finds it",
    r"database is locked": "SQLite on a busy machine: Prefect answers 503, and its clients repeat",
}
"""Patterns of errors that are expected, each with the reason."""

_HEAD = re.compile(r"\d\d:\d\d:\d\d\.\d+ \| |\d{4}/\d\d/\d\d \d\d:\d\d:\d\d |[A-Z]{4,8}[: ]")
_ERROR = re.compile(r"\b(ERROR|CRITICAL)\b|Traceback \(most recent call last\)")


def errors(stack: Stack) -> list[str]:
    """Return each entry with an error or a traceback that is not allowed, under its log's name."""
    return [
        f"{log.name}: {entry}"
        for service in ("s3", "mlflow", "prefect", "worker", "keeper")
        for log in (stack.log(service), stack.log(f"{service}.previous"))
        if log.exists()
        for entry in _entries(log)
        if _ERROR.search(entry) and not any(re.search(pattern, entry) for pattern in ALLOWED)
    ]


def _entries(log: Path) -> Iterator[str]:
    """Yield what was logged, one message at a time: its first line and what belongs to it."""
    entry = list[str]()
    for line in log.read_text(errors="replace").splitlines():
        if _HEAD.match(line) and entry:
            yield "\n".join(entry)
            entry = []
        entry.append(line)
    yield "\n".join(entry)
