"""End the servers of tests that died before they could: no teardown survives a SIGKILL.

python -m tests.reaper PID ROOT    # waits for the process, then stops the stack under ROOT
"""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from deployments.services import Ports, Stack
from deployments.stack import PROJECT, stop


@contextmanager
def reaped(root: Path) -> Iterator[None]:
    """Let the stack under a folder end with this process, however that ends."""
    command = [sys.executable, "-m", "tests.reaper", str(psutil.Process().pid), str(root)]
    reaper = subprocess.Popen(command, start_new_session=True, cwd=PROJECT)
    try:
        yield
    finally:
        reaper.terminate()
        reaper.wait()


def main() -> None:
    """Wait, then stop what is left."""
    pid, root = int(sys.argv[1]), Path(sys.argv[2])
    while psutil.pid_exists(pid):
        time.sleep(1)
    stop(Stack(root, Ports.free()), say=lambda _: None)


if __name__ == "__main__":
    main()
