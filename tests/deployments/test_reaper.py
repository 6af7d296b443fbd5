import subprocess
import sys
import time
from pathlib import Path

import pytest

from deployments import processes
from deployments.stack import PROJECT

TESTS = """
import os, signal, sys, time
from pathlib import Path
from deployments import processes
from tests.reaper import reaped
root = Path(sys.argv[1])
with reaped(root):
    server = [sys.executable, "-c", "import time; time.sleep(600)"]
    processes.launch("s3", server, owner=root, variables=dict(os.environ), log=root / "s3.log")
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_servers_end_with_tests_that_were_killed(tmp_path: Path) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", TESTS, str(tmp_path)], cwd=PROJECT, check=False, timeout=60
    )
    assert killed.returncode < 0
    assert processes.find(tmp_path)
    ends = time.monotonic() + 60
    while processes.find(tmp_path) and time.monotonic() < ends:
        time.sleep(0.5)
    assert not processes.find(tmp_path)
