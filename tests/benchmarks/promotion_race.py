"""Let many processes promote their own version at once, on a real registry.

    python tests/benchmarks/promotion_race.py --promotions 20 --json race.json

needs PREFECT_API_URL, MLFLOW_TRACKING_URI and the S3 variables of a running stack, and a bucket.
Each process does what a train run does: it reads the champion, asks to replace it, and starts over
when another was quicker. At the end there must be one champion and one history that leads to it.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import mlflow
from mlflow import MlflowClient

from mnist_cnn.evaluation import Evaluation
from mnist_cnn.promotion import Decision
from tasks.promote import find_champion, register_candidate, set_champion
from tasks.records import Candidate, ModelVersion
from tasks.registry.history import read_history, trace
from tasks.registry.versions import read_versions
from tasks.services.s3 import DEFAULT_STORE, Store


def make_version(name: str, number: int) -> ModelVersion:
    """Register a version that holds one small file; the registry does not look inside."""
    mlflow.set_experiment(name)
    with mlflow.start_run() as run, tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "weights").write_text(f"model {number}")
        model = mlflow.initialize_logged_model(name="model")
        MlflowClient().log_model_artifacts(model.model_id, folder)
        model = mlflow.finalize_logged_model(model.model_id, "READY")
    candidate = Candidate(
        name=name, run_id=run.info.run_id, model=f"models:/{model.model_id}", snapshot="abc"
    )
    decision = Decision(
        verdict="promote",
        reason="it is the turn of this one",
        checks=[],
        comparisons=[],
        candidate=candidate.model,
        champion=None,
        snapshot="abc",
        test_split="def",
        decisions=1,
        level=0.025,
    )
    known: dict[str, Any] = {"accuracy": 0.99, "outcomes": "s3://bucket/outcomes.npz"}
    measured = Evaluation.model_construct(**known)
    return register_candidate.fn(candidate, measured, decision, f"s3://bucket/{number}.json")


def promote(version: ModelVersion, store: str, waiting: int) -> int:
    """Promote in a forked process, which inherits the imports; return its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ["PREFECT__RUNTIME__FLOW_RUN__ID"] = str(uuid4())
        os.read(waiting, 1)  # all start when the parent closes its end
        while not set_champion.fn(version, find_champion.fn(version.name), "a race", store):
            pass
        code = 0
    finally:
        os._exit(code)


def main() -> int:
    """Print the table and return 0 only if there is one history and one champion."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--promotions", type=int, default=20)
    parser.add_argument("--store", default=DEFAULT_STORE)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    name = f"race-{uuid4().hex[:8]}-cnn"
    versions = [make_version(name, number) for number in range(arguments.promotions)]
    reading, writing = os.pipe()
    children = [promote(version, arguments.store, reading) for version in versions]
    began = time.perf_counter()
    os.write(writing, b"." * len(children))
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    seconds = time.perf_counter() - began
    champion = find_champion.fn(name)
    assert champion
    store = Store(arguments.store)
    history = read_history(store, name, read_versions(name), restore=False)
    done, unexplained = trace(history.moves, champion.version)
    result = {
        "promotions": len(codes),
        "processes that failed": sum(code != 0 for code in codes),
        "moves": len(history.moves),
        "moves carried out": sum(done),
        "versions promoted": len({move.to_version for move in history.moves}),
        "breaks in the history": [*history.problems, *unexplained, *map(str, history.lost)],
        "champion is the last move's": history.moves[-1].to_version == champion.version,
        "seconds": round(seconds, 1),
    }
    for what, value in result.items():
        print(f"{what:28} {value}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))
    whole = not result["breaks in the history"] and result["champion is the last move's"]
    return 0 if whole and not any(codes) and len(history.moves) == len(codes) else 1


if __name__ == "__main__":
    raise SystemExit(main())
