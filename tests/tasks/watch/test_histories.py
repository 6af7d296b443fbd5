"""The daily verification of histories fails nothing, and forgets nothing, while MLflow is away."""

from datetime import UTC, datetime, timedelta

import pytest

from tasks.registry.history import History
from tasks.registry.versions import Refused
from tasks.services.mlflow import RegistryError, RegistryUnreachable
from tasks.services.s3 import Store
from tasks.watch import histories
from tasks.watch.histories import Check, Checks, find_unread, note_checks, verify_histories

NOW = datetime(2026, 11, 23, 3, 30, tzinfo=UTC)
STORE = Store("s3://none")


def answer(monkeypatch: pytest.MonkeyPatch, **answers: Exception | list[str]) -> list[str]:
    """Let each model's history be whole, broken or unreadable; return whose were read."""
    asked = list[str]()

    def verify(model: str, _store: Store) -> tuple[History, list[bool], list[str]]:
        asked.append(model)
        given = answers[model]
        if isinstance(given, Exception):
            raise given
        return History((), (), ()), [], given

    monkeypatch.setattr(histories, "verify_history", verify)
    return asked


def test_one_model_that_mlflow_refuses_hides_no_broken_history(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answer(monkeypatch, a=RegistryError("no right to read a"), b=["move 2 is missing"], c=[])
    assert verify_histories(STORE, ["a", "b", "c"]) == (
        {"b": "move 2 is missing"},
        {"a": "no right to read a"},
    )


def test_a_registry_that_is_away_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answer(monkeypatch, a=[], b=RegistryUnreachable("MLflow is away"), c=[], d=[])
    _, unread = verify_histories(STORE, ["a", "b", "c", "d"])
    assert asked == ["a", "b"]
    assert unread == dict.fromkeys("bcd", "MLflow is away")


def test_a_model_that_is_gone_is_a_broken_history(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, a=Refused("there is no model a"))
    broken, _ = verify_histories(STORE, ["a"])
    assert broken == {"a": "it has a history, but there is no model a"}


@pytest.mark.parametrize(
    ("failed", "hours", "due"),
    [(False, 23.9, False), (False, 24, True), (True, 0.9, False), (True, 1, True)],
)
def test_a_history_is_read_once_a_day_and_an_hour_after_a_failure(
    hours: float, *, failed: bool, due: bool
) -> None:
    check = Check(tried=NOW, unread_since=NOW - timedelta(days=3) if failed else None)
    assert check.is_due(NOW + timedelta(hours=hours)) is due


def test_a_history_is_unread_since_it_first_failed_until_it_is_read() -> None:
    day = timedelta(days=1)
    first = note_checks(Checks(), ["a", "b"], {"a": "away"}, NOW)
    second = note_checks(first, ["a"], {"a": "refused"}, NOW + day)
    assert [(each.model, each.since, each.reason) for each in find_unread(second)] == [
        ("a", NOW, "refused")
    ]
    assert second.models["b"].tried == NOW
    assert find_unread(note_checks(second, ["a"], {}, NOW + 2 * day)) == []


def test_a_record_of_an_earlier_version_can_be_read() -> None:
    assert Checks.model_validate_json("{}").models == {}
