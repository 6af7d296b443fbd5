import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate
from prefect.exceptions import ObjectNotFound

from deployments.stack import PROJECT, Stack
from tasks.promote import (
    approve_challenger,
    find_champion,
    reject_challenger,
    roll_back_champion,
    set_challenger,
    set_champion,
)
from tasks.records import Candidate, ModelVersion
from tasks.registry.aliases import find_rollback
from tasks.registry.history import Account, History, read_history, trace
from tasks.registry.versions import Refused, read_versions
from tasks.services.lock import exclusive
from tasks.services.mlflow import RegistryError
from tasks.services.s3 import DEFAULT_STORE, Store
from tests.tasks.versions import (
    make_candidate,
    make_challenger,
    make_champion,
    register,
)

ADA = Account(who="Ada", why="I looked at the pictures")


@pytest.fixture
def name(stack: Stack) -> str:
    return f"test-{uuid4().hex[:8]}-cnn"


@pytest.fixture
def candidate(name: str) -> Candidate:
    return make_candidate(name)


def aliases(name: str) -> dict[str, str]:
    return dict(MlflowClient().get_registered_model(name).aliases)


def history_of(name: str) -> History:
    return read_history(Store(DEFAULT_STORE), name, read_versions(name), restore=False)


def tell(name: str) -> list[tuple[str, str | None, str]]:
    history = history_of(name)
    assert (history.problems, history.lost) == ((), ())
    return [(move.action, move.from_version, move.to_version) for move in history.moves]


def approve(version: ModelVersion) -> ModelVersion:
    return approve_challenger.fn(version.name, int(version.version), ADA, DEFAULT_STORE)


def reject(version: ModelVersion) -> ModelVersion:
    return reject_challenger.fn(version.name, int(version.version), ADA, DEFAULT_STORE)


def test_an_unknown_model_has_no_champion(stack: Stack) -> None:
    assert find_champion.fn("never-registered") is None


def test_a_model_without_the_alias_has_no_champion(candidate: Candidate) -> None:
    register(candidate)
    assert find_champion.fn(candidate.name) is None


def test_a_registry_that_cannot_be_read_is_not_an_empty_one(
    candidate: Candidate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    with pytest.raises(RegistryError, match=r"could not be read .* nothing is promoted"):
        find_champion.fn(candidate.name)


def test_a_broken_answer_is_not_an_empty_registry(
    candidate: Candidate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise MlflowException("INTERNAL_ERROR: database is locked")

    monkeypatch.setattr(MlflowClient, "get_registered_model", broken)
    with pytest.raises(RegistryError, match="database is locked"):
        find_champion.fn(candidate.name)


def test_a_rejected_candidate_is_registered_with_its_reason(candidate: Candidate) -> None:
    version = register(candidate)
    registered = MlflowClient().get_model_version(version.name, version.version)
    assert registered.tags["verdict"] == "keep"
    assert registered.tags["reason"] == "accuracy floor: 0.9000 is below 0.9800"
    assert registered.tags["snapshot"] == "abc"
    assert registered.tags["decision_record"] == "s3://b/0.json"
    assert str(registered.description).startswith("keep: ")


def test_registering_twice_makes_one_version(candidate: Candidate) -> None:
    assert register(candidate) == register(candidate)
    found = MlflowClient().search_model_versions(f"name = '{candidate.name}'")
    assert len(found) == 1


def test_a_decision_made_anew_replaces_the_former_on_the_same_version(name: str) -> None:
    champion = make_champion(name)
    candidate = make_candidate(name)
    first = register(candidate, "promote")
    assert register(candidate, "keep", champion) == first
    tags = MlflowClient().get_model_version(name, first.version).tags
    assert (tags["verdict"], tags["compared_with"]) == ("keep", champion.model)


def test_a_candidate_that_is_judged_anew_and_kept_can_no_longer_be_approved(name: str) -> None:
    champion = make_champion(name)
    candidate = make_candidate(name)
    waiting = register(candidate, "needs-approval", champion)
    set_challenger.fn(waiting)
    other = make_champion(name, replaces=champion)
    assert register(candidate, "keep", other) == waiting
    assert "challenger" not in aliases(name)
    MlflowClient().set_registered_model_alias(name, "challenger", waiting.version)
    with pytest.raises(Refused, match="was judged 'keep', which nobody may approve"):
        approve(waiting)


def test_a_promotion_moves_champion_and_previous_and_a_repeat_changes_nothing(name: str) -> None:
    first = make_champion(name)
    assert aliases(name) == {"champion": "1"}
    second = make_champion(name, replaces=first)
    assert aliases(name) == {"champion": "2", "previous": "1"}
    assert set_champion.fn(second, first, "again", DEFAULT_STORE)
    assert aliases(name) == {"champion": "2", "previous": "1"}
    assert tell(name) == [("promote", None, "1"), ("promote", "1", "2")]


def test_a_champion_that_changed_meanwhile_is_not_replaced(name: str) -> None:
    first = make_champion(name)
    late = register(make_candidate(name), "promote")
    assert not set_champion.fn(late, None, "it was compared with nothing", DEFAULT_STORE)
    assert find_champion.fn(name) == first
    assert len(tell(name)) == 1


def test_an_approved_challenger_is_champion_and_no_longer_challenger(name: str) -> None:
    champion = make_champion(name)
    challenger = make_challenger(name, champion)
    assert approve(challenger) == challenger
    assert aliases(name) == {"champion": "2", "previous": "1"}
    last = history_of(name).moves[-1]
    assert (last.action, last.who, last.why) == ("approve", ADA.who, ADA.why)
    description = MlflowClient().get_model_version(name, "2").description
    assert "Move 2: approved by Ada: I looked at the pictures" in str(description)


def test_a_rejected_challenger_leaves_the_champion_and_a_record(name: str) -> None:
    challenger = make_challenger(name, make_champion(name))
    reject(challenger)
    assert aliases(name) == {"champion": "1"}
    assert tell(name)[-1] == ("reject", "1", "2")
    description = MlflowClient().get_model_version(name, "2").description
    assert "rejected by Ada" in str(description)


def test_of_two_judgements_the_second_is_refused(name: str) -> None:
    challenger = make_challenger(name, make_champion(name))
    approve(challenger)
    with pytest.raises(Refused, match=r"version 2 of .* is the champion already"):
        approve(challenger)
    with pytest.raises(Refused, match="does not await approval, none does"):
        reject(challenger)
    assert len(tell(name)) == 2


def test_a_rejected_version_can_neither_be_approved_nor_rolled_back_to(name: str) -> None:
    challenger = make_challenger(name, make_champion(name))
    reject(challenger)
    with pytest.raises(Refused, match="does not await approval, none does"):
        approve(challenger)
    with pytest.raises(Refused, match=r"never champion \(it was judged 'needs-approval'"):
        find_rollback(name, 2, DEFAULT_STORE)


def test_a_version_that_was_judged_promote_and_never_was_champion_is_refused(
    name: str,
) -> None:
    """Its run died before the alias moved, or another champion came meanwhile."""
    champion = make_champion(name)
    register(make_candidate(name), "promote", champion)
    with pytest.raises(Refused, match=r"version 2 of .* was never champion"):
        find_rollback(name, 2, DEFAULT_STORE)


def test_an_approval_is_stale_when_another_champion_came(name: str) -> None:
    champion = make_champion(name)
    challenger = make_challenger(name, champion)
    make_champion(name, replaces=champion)
    with pytest.raises(Refused, match=r"compared with models:/.*/1, but now there is models:/.*/3"):
        approve(challenger)
    assert aliases(name)["champion"] == "3"


def test_an_approval_is_refused_when_a_newer_challenger_waits(name: str) -> None:
    champion = make_champion(name)
    first, _ = make_challenger(name, champion), make_challenger(name, champion)
    with pytest.raises(Refused, match=r"version 2 of .* does not await approval, version 3 does"):
        approve(first)


def test_an_approval_is_refused_when_the_artifacts_changed(name: str) -> None:
    champion = make_champion(name)
    candidate = make_candidate(name)
    challenger = register(candidate, "needs-approval", champion)
    set_challenger.fn(challenger)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "weights").write_text("other weights")
        MlflowClient().log_model_artifacts(candidate.model.removeprefix("models:/"), folder)
    with pytest.raises(Refused, match=r"not .* as when it was evaluated; somebody changed them"):
        approve(challenger)
    assert aliases(name)["champion"] == "1"


def test_what_is_unknown_is_refused_by_name(name: str) -> None:
    make_champion(name)
    with pytest.raises(Refused, match="has no version 9; its versions are: 1"):
        find_rollback(name, 9, DEFAULT_STORE)
    with pytest.raises(Refused, match="no model is registered as 'nothing-cnn'"):
        find_rollback("nothing-cnn", None, DEFAULT_STORE)


def test_a_half_registered_version_is_refused(name: str) -> None:
    make_champion(name)
    candidate = make_candidate(name)
    mlflow.register_model(candidate.model, name)
    with pytest.raises(Refused, match=r"half registered .* without snapshot, verdict"):
        find_rollback(name, 2, DEFAULT_STORE)


def test_a_rollback_without_a_previous_champion_says_what_to_do(name: str) -> None:
    make_champion(name)
    with pytest.raises(Refused, match="no previous champion to roll back to; name a version"):
        find_rollback(name, None, DEFAULT_STORE)
    with pytest.raises(Refused, match=r"version 1 of .* is the champion already"):
        find_rollback(name, 1, DEFAULT_STORE)


def test_a_rollback_exchanges_champion_and_previous(name: str) -> None:
    first = make_champion(name)
    second = make_champion(name, replaces=first)
    assert find_rollback(name, None, DEFAULT_STORE) == (first, second)
    roll_back_champion.fn(first, second, ADA, DEFAULT_STORE)
    assert aliases(name) == {"champion": "1", "previous": "2"}
    assert tell(name)[-1] == ("roll back", "2", "1")


def test_a_rollback_is_refused_when_the_champion_changed_during_it(name: str) -> None:
    first = make_champion(name)
    second = make_champion(name, replaces=first)
    third = make_champion(name, replaces=second)
    with pytest.raises(Refused, match=f"the champion of .* became {third.model}"):
        roll_back_champion.fn(first, second, ADA, DEFAULT_STORE)
    assert find_champion.fn(name) == third


def test_a_version_whose_artifacts_are_gone_is_named_with_the_way_out(name: str) -> None:
    first = make_champion(name)
    make_champion(name, replaces=first)
    uri = MlflowClient().get_model_version_download_uri(name, first.version)
    path = uri.removeprefix("mlflow-artifacts:/")
    store = Store(f"{DEFAULT_STORE}/mlflow")
    for found in store.names(path):
        store.remove(found)
    assert not store.names(path)
    with pytest.raises(
        Refused, match=f"{first.model} .*they are gone: roll back to a version that loads"
    ):
        find_rollback(name, None, DEFAULT_STORE)


def test_a_write_that_the_registry_refuses_is_a_sentence(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_champion(name)
    second = register(make_candidate(name), "promote", first)

    def broken(*_: object) -> None:
        raise MlflowException("INTERNAL_ERROR: database is locked")

    with monkeypatch.context() as fault:
        fault.setattr(MlflowClient, "set_registered_model_alias", broken)
        with pytest.raises(RegistryError, match=r"the aliases .* database is locked"):
            set_champion.fn(second, first, "better", DEFAULT_STORE)
    assert find_champion.fn(name) == first


def test_the_limit_of_promotions_is_put_back_to_one(name: str) -> None:
    limit = f"promote-{name}"
    make_champion(name)
    with get_client(sync_client=True) as prefect:
        loose = GlobalConcurrencyLimitUpdate(limit=50, active=False)
        prefect.update_global_concurrency_limit(limit, loose)
        with exclusive(name):
            held = prefect.read_global_concurrency_limit_by_name(limit)
    assert (held.limit, held.active, held.active_slots) == (1, True, 1)


WRITES = 7
"""What an approval writes: tag, object, previous, champion, confirmation, description, challenger.
"""

CHAMPION_MOVES = 4

KILLED = """
import os, sys
from mlflow import MlflowClient
from tasks.registry.history import Account
from tasks.promote import approve_challenger
from tasks.services.s3 import Store
from tests.tasks.kill import kill_before_each_write

def approve(name):
    os.environ["PREFECT__RUNTIME__FLOW_RUN__ID"] = "run-of-" + name
    approve_challenger.fn(name, 2, Account(who="Ada", why="I looked"), sys.argv[1])

writes = [
    (MlflowClient, "set_model_version_tag"), (MlflowClient, "set_registered_model_alias"),
    (MlflowClient, "update_model_version"), (Store, "put"),
    (MlflowClient, "delete_registered_model_alias"),
]
for name, code in kill_before_each_write(sys.argv[2:], writes, approve):
    print(name, code, flush=True)
"""


def free_what_the_dead_hold(name: str) -> None:
    """Do what the end of a lease does, a minute early.

    The limit goes with its slot: the leases of the dead end later, and would free a slot that
    somebody else holds by then.
    """
    with get_client(sync_client=True) as prefect, suppress(ObjectNotFound):
        prefect.delete_global_concurrency_limit_by_name(f"promote-{name}")


@pytest.mark.parametrize("same_run", [True, False])
def test_an_approval_killed_at_any_write_has_one_champion_and_a_repeat_finishes_it(
    name: str, monkeypatch: pytest.MonkeyPatch, *, same_run: bool
) -> None:
    # Once `champion` has moved, there is nothing left for which it matters whose run repeats it.
    names = [f"{name}-{number}" for number in range(WRITES + 1 if same_run else CHAMPION_MOVES)]
    for each in names:
        make_challenger(each, make_champion(each))
    command = [sys.executable, "-c", KILLED, DEFAULT_STORE, *names]
    run = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    codes = [line.split() for line in run.stdout.splitlines() if line.startswith(name)]
    killed = names[:WRITES]
    expected = [[each, "-9"] for each in killed] + [[each, "0"] for each in names[WRITES:]]
    assert codes == expected, run.stderr
    for number, each in enumerate(names):
        assert aliases(each)["champion"] == ("1" if number < CHAMPION_MOVES else "2")
    for number, each in enumerate(names):
        free_what_the_dead_hold(each)
        again = f"run-of-{each}" if same_run else f"second-run-of-{each}"
        monkeypatch.setenv("PREFECT__RUNTIME__FLOW_RUN__ID", again)
        approve_challenger.fn(each, 2, ADA, DEFAULT_STORE)
        assert aliases(each) == {"champion": "2", "previous": "1"}, number
        history = history_of(each)
        assert history.problems == ()
        done, unexplained = trace(history.moves, "2")
        assert unexplained == []
        assert done[-1]
        if same_run:
            assert len(history.moves) == 2, number
            assert history.lost == (), number


def test_six_promotions_at_once_end_with_one_champion_and_one_history(stack: Stack) -> None:
    race = [sys.executable, "tests/benchmarks/promotion_race.py", "--promotions", "6"]
    variables = os.environ | {"PYTHONPATH": str(PROJECT)}
    run = subprocess.run(
        race, cwd=PROJECT, env=variables, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
