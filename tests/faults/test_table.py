"""What ends the table of faults ends its processes, after they have ended their stacks."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from deployments.services import PROJECT

TABLE = """
import os, pathlib, sys, time
from contextlib import contextmanager
from tests.faults import table

notes = pathlib.Path(sys.argv[0]).parent

@contextmanager
def opened(root):
    (notes / f"{root.name}.begun").write_text(str(os.getpid()))
    try:
        yield
    finally:
        time.sleep(1)
        (notes / f"{root.name}.stopped").touch()

table.opened = opened
table._quiet_automations = table.train_template = lambda _bench: None
table.run_pair = lambda *_: [time.sleep(0.2) for _ in range(3000)]

if __name__ == "__main__":
    sys.exit(table.main())
"""
"""The table, as its own processes import it too, on stacks that only leave notes."""


@pytest.mark.slow
def test_what_ends_the_table_ends_its_stacks(tmp_path: Path) -> None:
    script = tmp_path / "table.py"
    script.write_text(TABLE)
    table = subprocess.Popen(
        [sys.executable, script, "--part", "2", "--jobs", "2"],
        env=os.environ | {"PYTHONPATH": str(PROJECT)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    begun = [tmp_path / f"{stack}.begun" for stack in (0, 1)]
    while not all(note.exists() and note.read_text() for note in begun):
        assert table.poll() is None
        time.sleep(0.1)
    os.killpg(table.pid, signal.SIGINT)  # as a terminal's Ctrl-C does
    time.sleep(0.5)
    if table.poll() is None:
        table.terminate()  # somebody is impatient
    told, _ = table.communicate(timeout=60)
    assert table.returncode == 130
    assert "Stopped, and with it every stack" in told
    assert [(tmp_path / f"{stack}.stopped").exists() for stack in (0, 1)] == [True, True]
    assert not any(psutil.pid_exists(int(note.read_text())) for note in begun)
