"""The plan, the judgement and the picture of a year; `make year` lives one."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from deployments.keep import GROWN
from tests.faults.check import check
from tests.faults.draw import draw
from tests.faults.plan import plan_year
from tests.faults.record import (
    ArrivalSeen,
    ChampionSeen,
    MessageSeen,
    MoveSeen,
    Record,
    RunSeen,
    Sizes,
    StateSeen,
    Whereabouts,
)

PROMISES = {
    "no week missed",
    "every image once",
    "batches judged rightly",
    "one champion, history whole",
    "no run left",
    "every fault told, once",
    "every quarantine told",
    "memory flat",
    "the plan was carried out",
}
"""What a year keeps however fast the machine is."""


def run_of(week: int, *states: tuple[str, str]) -> RunSeen:
    seen = [
        StateSeen(when=100.0 + 10 * week + number, type=kind, name=name)
        for number, (kind, name) in enumerate([("RUNNING", "Running"), *states])
    ]
    return RunSeen(
        id=f"run-{week}",
        flow="train",
        due=100.0 + 10 * week,
        scheduled=True,
        message="",
        states=seen,
    )


def sizes(when: float, store: int = 1000, **memory: int) -> Sizes:
    memory = {"MLflow server": 100, "worker": 100} | memory
    return Sizes(when=when, store=store, databases={"mlflow": 10}, memory=memory)


@pytest.fixture
def record() -> Record:
    """Return three weeks in which all went well: a kill, a failure that was told and repeated."""
    return Record(
        seed=0,
        weeks=3,
        interval=10.0,
        begun=100.0,
        ended=130.0,
        runs=[
            run_of(0, ("CRASHED", "Crashed"), ("RUNNING", "Running"), ("COMPLETED", "Promoted")),
            run_of(1, ("COMPLETED", "Overtaken")),
            run_of(2, ("FAILED", "Failed"), ("RUNNING", "Running"), ("COMPLETED", "Skipped")),
        ],
        faults=[],
        arrivals=[
            ArrivalSeen(name="a", content="good", when=101.0, late=False, images=["1", "2"]),
            ArrivalSeen(name="b", content="inverted", when=111.0, late=False, images=["3"]),
            ArrivalSeen(name="c", content="good", when=129.0, late=True, images=["4"]),
        ],
        whereabouts=Whereabouts(accepted=["1", "2"], quarantined=["3"], waiting=["4"]),
        refused=["b"],
        champions=[ChampionSeen(when=99.0, version=None), ChampionSeen(when=103.0, version="1")],
        moves=[MoveSeen(when=103.0, action="promote", version="1", who="train/weekly")],
        history_problems=[],
        messages=[
            MessageSeen(when=104.0, fields={"type": "success", "run": "run-0", "subject": "s"}),
            MessageSeen(when=112.0, fields={"type": "warning", "batches": "b"}),
            MessageSeen(when=121.0, fields={"type": "failure", "run": "run-2", "subject": "f"}),
        ],
        acts=[],
        sizes=[sizes(100.0), sizes(110.0), sizes(120.0)],
        retained=sizes(130.0, store=900),
        mishaps=[],
    )


def broken(record: Record) -> set[str]:
    return {promise.name for promise in check(record) if not promise.kept} & PROMISES


def test_a_year_in_which_all_went_well_keeps_every_promise(record: Record) -> None:
    assert broken(record) == set()
    assert {promise.name for promise in check(record)} >= PROMISES


def test_a_week_that_a_training_of_an_event_overtook_is_not_missed(record: Record) -> None:
    overtaken = run_of(2, ("COMPLETED", "Overtaken"))
    event = run_of(3, ("COMPLETED", "Promoted")).model_copy(update={"scheduled": False})
    assert "no week missed" in broken(
        record.model_copy(update={"runs": [*record.runs[:2], overtaken]})
    )
    runs = [*record.runs[:2], overtaken, event]
    assert "no week missed" not in broken(record.model_copy(update={"runs": runs}))


def lie(where: Whereabouts, **images: list[str]) -> dict[str, Whereabouts]:
    return {"whereabouts": where.model_copy(update=images)}


def told(kind: str, **fields: str) -> MessageSeen:
    return MessageSeen(when=125.0, fields={"type": kind, **fields})


def champion(version: str | None) -> ChampionSeen:
    return ChampionSeen(when=125.0, version=version)


LIES: dict[str, tuple[str, Callable[[Record], Mapping[str, object]]]] = {
    "a week has no run": ("no week missed", lambda r: {"runs": r.runs[:2]}),
    "a week failed": (
        "no week missed",
        lambda r: {"runs": [*r.runs[:2], run_of(2, ("FAILED", "Failed"))]},
    ),
    "images are lost": ("every image once", lambda r: lie(r.whereabouts, waiting=[])),
    "an image is doubled": ("every image once", lambda r: lie(r.whereabouts, waiting=["4", "1"])),
    "a good batch is refused": ("batches judged rightly", lambda r: {"refused": [*r.refused, "a"]}),
    "a bad batch is accepted": (
        "batches judged rightly",
        lambda r: lie(r.whereabouts, accepted=["3"]),
    ),
    "nobody is champion": (
        "one champion, history whole",
        lambda r: {"champions": [*r.champions, champion(None)]},
    ),
    "a champion that no move explains": (
        "one champion, history whole",
        lambda r: {"champions": [*r.champions, champion("2")]},
    ),
    "a broken history": (
        "one champion, history whole",
        lambda r: {"history_problems": [*r.history_problems, "move 1 is missing"]},
    ),
    "a run goes on for ever": ("no run left", lambda r: {"runs": [*r.runs, run_of(2)]}),
    "a silent fault": ("every fault told, once", lambda r: {"messages": r.messages[:2]}),
    "a fault told twice": (
        "every fault told, once",
        lambda r: {"messages": [*r.messages, told("failure", run="run-2")]},
    ),
    "a false alarm": (
        "every fault told, once",
        lambda r: {"messages": [*r.messages, told("failure", run="run-0")]},
    ),
    "a silent quarantine": (
        "every quarantine told",
        lambda r: {"messages": [r.messages[0], r.messages[2]]},
    ),
    "a server that grows": (
        "memory flat",
        lambda _: {"sizes": [sizes(100.0 + n, **{"MLflow server": 100 + 9 * n}) for n in range(8)]},
    ),
    "a worker that grows beyond its limit": (
        "memory flat",
        lambda r: {"sizes": [*r.sizes, sizes(125.0, worker=2 * GROWN)]},
    ),
    "a server that did not start": (
        "the plan was carried out",
        lambda r: {"mishaps": [*r.mishaps, "it did not start"]},
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_each_promise_that_is_broken_shows(record: Record, name: str) -> None:
    promise, spoil = LIES[name]
    assert promise in broken(record.model_copy(update=spoil(record)))


def test_a_plan_is_the_same_for_the_same_seed_and_has_two_faults_a_week_and_some_more() -> None:
    year = plan_year(3, 52)
    assert year == plan_year(3, 52)
    assert year != plan_year(4, 52)
    assert len(year.faults) >= 110
    assert len(year.rollbacks) == 2
    assert {True, False} == set(year.approves)
    contents = {arrival.content for arrival in year.arrivals}
    assert contents == {"good", "inverted", "shuffled labels"}
    assert any(arrival.marked_after for arrival in year.arrivals)
    assert len({arrival.week for arrival in year.arrivals}) < year.weeks, "each week has a batch"


def test_a_picture_is_drawn(record: Record, tmp_path: Path) -> None:
    draw(record, tmp_path / "year.png")
    assert (tmp_path / "year.png").read_bytes().startswith(b"\x89PNG")
