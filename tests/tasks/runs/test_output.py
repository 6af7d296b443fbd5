import os
import subprocess
import sys
from pathlib import Path

import pytest

FLOW = """
import sys
from pathlib import Path
from prefect.logging import get_logger
from prefect.logging.configuration import setup_logging
setup_logging()
if sys.argv[2] == "outlives":
    import flows
sys.stdin.readline()
for number in range(3):
    get_logger("flow_runs").warning("line %d", number)
    print("line", number, flush=True)
Path(sys.argv[1]).write_text("the end")
"""


@pytest.mark.parametrize(("way", "ended"), [("outlives", True), ("plain", False)])
def test_a_flow_whose_worker_has_died_goes_on(tmp_path: Path, way: str, *, ended: bool) -> None:
    """Without it the same program ends at its first line, as any flow of Prefect's does."""
    read, write = os.pipe()
    flow = subprocess.Popen(
        [sys.executable, "-c", FLOW, str(tmp_path / "end"), way],
        stdin=subprocess.PIPE,
        stdout=write,
        stderr=write,
        env=os.environ | {"PREFECT__FLOW_RUN_ID": "a worker's"},
    )
    os.close(write)
    os.close(read)
    flow.communicate(b"the reader has gone\n", timeout=60)
    assert (tmp_path / "end").exists() is ended
