"""A training that dies after its model became champion goes on to the verdict that it had."""

import subprocess
import sys
from contextlib import suppress
from typing import Any
from uuid import UUID

import pytest
from mlflow import MlflowClient
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound

from deployments.stack import PROJECT, Stack
from flows.promote import roll_back
from flows.train import train
from mnist_cnn.promotion import Decision
from tasks.promote import find_champion
from tasks.registry.history import read_history, trace
from tasks.registry.versions import read_versions
from tasks.services.s3 import Store
from tests.flows.runs import create_run, retry

NAME = "digits-cnn"
PLACE = "s3://mnist-retraining/tests/train-once"

DYING = """
import os, signal, sys
from uuid import UUID
from mlflow import MlflowClient
from flows.train import train
from tasks import decide
from tasks.services.s3 import Store
from tests.flows.runs import execute, retry
from tests.flows.test_train_once import better

run, first, method, word = sys.argv[1:]
owner = Store if method == "put" else MlflowClient
write = getattr(owner, method)

def write_or_die(*arguments, **options):
    if any(word in str(argument) for argument in arguments[1:]):
        os.kill(os.getpid(), signal.SIGKILL)
    return write(*arguments, **options)

setattr(owner, method, write_or_die)
decide.decide = better
(execute if first == "first" else retry)(train, UUID(run))
"""

DEATHS = [
    ("set_registered_model_alias", "champion"),
    ("put", "carried-out"),  # the alias has moved
    ("put", "outcome.json"),
]
"""The writes before which the run dies, one after another."""


def better(*arguments: Any) -> Decision:
    from mnist_cnn.promotion import decide

    return decide(*arguments).model_copy(update={"verdict": "promote", "reason": "better"})


def die(run: UUID, attempt: int, method: str, word: str) -> None:
    first = "again" if attempt else "first"
    command = [sys.executable, "-c", DYING, str(run), first, method, word]
    died = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert died.returncode == -9, died.stdout + died.stderr
    # As the end of its lease does; a later end would free a slot that somebody else holds by then.
    with get_client(sync_client=True) as prefect, suppress(ObjectNotFound):
        prefect.delete_global_concurrency_limit_by_name(f"promote-{NAME}")


def judged(version: str) -> dict[str, str]:
    tags = MlflowClient().get_model_version(NAME, version).tags
    return {key: tags[key] for key in ("verdict", "reason", "compared_with", "decision_record")}


def records_of(run: UUID) -> list[str]:
    return [name for name in Store(PLACE).names("datasets/digits/decisions/") if str(run) in name]


def test_a_promotion_that_dies_again_and_again_is_one_promotion_and_a_retry_repeats_nothing(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = {"preset": "quick"}
    assert train("digits", quick, store=PLACE, return_state=True).name == "Promoted"
    run = create_run(train, dataset="digits", training=quick, store=PLACE, force=True)
    for attempt, (method, word) in enumerate(DEATHS):
        die(run, attempt, method, word)
        assert MlflowClient().get_registered_model(NAME).aliases["champion"] == "12"[attempt > 0]
        assert judged("2")["verdict"] == "promote"
    before, records = judged("2"), records_of(run)
    assert before["compared_with"] == f"models:/{NAME}/1"

    monkeypatch.setattr("tasks.decide.decide", lambda *_: pytest.fail("it decided again"))
    state = retry(train, run)
    assert (state.name, state.is_completed()) == ("Promoted", True), state.message
    assert judged("2") == before
    assert records_of(run) == records
    assert len(records) == 1
    history = read_history(Store(PLACE), NAME, read_versions(NAME), restore=False)
    assert history.problems == ()
    assert [(m.from_version, m.to_version) for m in history.moves] == [(None, "1"), ("1", "2")]
    assert trace(history.moves, "2", history.confirmed) == ([True, True], [])
    summary = Store(PLACE).get(f"runs/{run}/summary.json")
    assert f'"champion_before": "models:/{NAME}/1"'.encode() in summary

    undone = roll_back(reason="it drifts", who="Ada", model=NAME, store=PLACE, return_state=True)
    assert undone.name == "Rolled back", undone.message
    for outcome_is_on_record in (True, False):
        if not outcome_is_on_record:
            Store(PLACE).remove(f"runs/{run}/outcome.json")
        again = retry(train, run)
        assert (again.name, again.message) == (state.name, state.message)
        champion = find_champion.fn(NAME)
        assert champion
        assert champion.version == "1"
        assert judged("2") == before
