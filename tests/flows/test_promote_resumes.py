"""What a person asked for once happens once, wherever the run dies and however often it goes on."""

import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from uuid import UUID, uuid4

import pytest
from mlflow import MlflowClient
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound

from deployments.stack import PROJECT, Stack
from flows import promote
from tasks.registry.history import read_history, trace
from tasks.registry.versions import read_versions
from tasks.services.s3 import DEFAULT_STORE, Store
from tests.flows.runs import create_run, execute, retry
from tests.tasks.versions import make_challenger, make_champion

KILLED = """
import sys
from uuid import UUID
from mlflow import MlflowClient
from flows import promote
from tasks.services.s3 import Store
from tests.flows.runs import execute
from tests.tasks.kill import kill_before_each_write

promote.try_version = lambda *_: 0.99
flow = getattr(promote, sys.argv[1])
writes = [
    (MlflowClient, "set_model_version_tag"), (MlflowClient, "set_registered_model_alias"),
    (MlflowClient, "update_model_version"), (Store, "put"),
    (MlflowClient, "delete_registered_model_alias"),
]
for run, code in kill_before_each_write(sys.argv[2:], writes, lambda run: execute(flow, UUID(run))):
    print(run, code, flush=True)
"""

ADA = {"reason": "it drifts", "who": "Ada", "store": DEFAULT_STORE}
Parameters = Mapping[str, object]


def two_champions(name: str) -> None:
    make_champion(name, replaces=make_champion(name))


def champion_and_challenger(name: str) -> None:
    make_challenger(name, make_champion(name))


ROLLED_BACK = {"champion": "1", "previous": "2"}

ASKED: dict[str, tuple[Callable[[str], None], Parameters, int, str, dict[str, str]]] = {
    # The target, the tag, its object, previous, champion, confirmation, description, outcome.
    "roll_back": (two_champions, ADA, 8, "Rolled back", ROLLED_BACK),
    # The tag, its object, description, challenger's end, outcome.
    "judge": (
        *(champion_and_challenger, ADA | {"judgement": "reject", "version": 2}),
        *(5, "Rejected", {"champion": "1"}),
    ),
}
"""For each flow the versions before, parameters, number of writes, state and aliases after."""


def free_what_the_dead_hold(name: str) -> None:
    """Do what the end of a lease does, a minute early.

    The limit goes with its slot: the leases of the dead end later, and would free a slot that
    somebody else holds by then.
    """
    with get_client(sync_client=True) as prefect, suppress(ObjectNotFound):
        prefect.delete_global_concurrency_limit_by_name(f"promote-{name}")


def registered(name: str) -> tuple[dict[str, str], list[tuple[str, dict[str, str], str]]]:
    versions = read_versions(name)
    told = sorted((str(v.version), v.tags, str(v.description)) for v in versions)
    return MlflowClient().get_registered_model(name).aliases, told


@pytest.mark.parametrize("flow_name", ASKED)
def test_a_run_killed_before_any_write_goes_on_to_what_was_asked_and_a_retry_changes_nothing(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, flow_name: str
) -> None:
    prepare, parameters, writes, ended, aliases = ASKED[flow_name]
    flow = getattr(promote, flow_name)
    names = [f"test-{uuid4().hex[:8]}-cnn" for _ in range(writes + 1)]
    for name in names:
        prepare(name)
    runs = {str(create_run(flow, model=name, **parameters)): name for name in names}
    command = [sys.executable, "-c", KILLED, flow_name, *runs]
    died = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    told = [line.split() for line in died.stdout.splitlines() if line[:36] in runs]
    codes = ["-9"] * writes + ["0"]
    assert told == [[run, code] for run, code in zip(runs, codes, strict=True)], died.stderr
    monkeypatch.setattr("flows.promote.try_version", lambda *_: 0.99)
    for number, (run, name) in enumerate(runs.items()):
        free_what_the_dead_hold(name)
        state = retry(flow, UUID(run))
        assert state.name == ended, (number, state.message)
        after = registered(name)
        assert after[0] == aliases, number
        history = read_history(Store(DEFAULT_STORE), name, read_versions(name), restore=False)
        assert (history.problems, history.lost) == ((), ()), number
        done, unexplained = trace(history.moves, aliases["champion"], history.confirmed)
        assert all(done), number
        assert unexplained == [], number
        assert [move.run for move in history.moves].count(run) == 1, number
    again = retry(flow, UUID(run))
    assert (again.type, again.name, again.message) == (state.type, state.name, state.message)
    assert registered(name) == after


def test_a_rollback_that_is_resumed_goes_to_the_version_that_was_previous_when_it_was_asked(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"test-{uuid4().hex[:8]}-cnn"
    two_champions(name)

    def out_of_memory(*_: object) -> float:
        raise MemoryError

    monkeypatch.setattr("flows.promote.try_version", out_of_memory)
    run = create_run(promote.roll_back, model=name, **ADA)
    assert execute(promote.roll_back, run).is_failed()
    MlflowClient().set_registered_model_alias(name, "previous", "2")
    monkeypatch.setattr("flows.promote.try_version", lambda *_: 0.99)
    assert retry(promote.roll_back, run).name == "Rolled back"
    assert MlflowClient().get_registered_model(name).aliases == ROLLED_BACK


def test_a_rollback_that_begins_after_the_champion_has_moved_asks_which_version_was_meant(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when its first attempt died before it had looked, and the person typed it again."""
    name = f"test-{uuid4().hex[:8]}-cnn"
    two_champions(name)
    monkeypatch.setattr("flows.promote.try_version", lambda *_: 0.99)
    run = create_run(promote.roll_back, model=name, **ADA)
    assert promote.roll_back(model=name, return_state=True, **ADA).name == "Rolled back"
    state = execute(promote.roll_back, run)
    assert (state.name, "after this rollback was asked for" in str(state.message)) == (
        "Refused",
        True,
    )
    assert MlflowClient().get_registered_model(name).aliases == ROLLED_BACK


def test_a_rollback_that_somebody_undid_since_is_not_done_again(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its run died after the move: the outcome is not on record, the move is."""
    name = f"test-{uuid4().hex[:8]}-cnn"
    two_champions(name)
    monkeypatch.setattr("flows.promote.try_version", lambda *_: 0.99)
    first = create_run(promote.roll_back, model=name, **ADA)
    assert execute(promote.roll_back, first).name == "Rolled back"
    for record in ("outcome", "rollback"):
        Store(DEFAULT_STORE).remove(f"runs/{first}/{record}.json")
    undone = promote.roll_back(model=name, to=2, return_state=True, **ADA)
    assert undone.name == "Rolled back"
    before = registered(name)
    assert retry(promote.roll_back, first).name == "Rolled back"
    assert registered(name) == before
