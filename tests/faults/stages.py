"""The stages of the table: how each begins, which run passes it, and what must be true after it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from uuid import UUID

from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import StateType

from tasks import keys
from tasks.datasets.ledger import read_ledger
from tasks.registry.history import read_history, trace
from tasks.registry.versions import read_model, read_versions
from tasks.services.s3 import DEFAULT_STORE, Store
from tests.faults.bench import Bench
from tests.faults.prepare import (
    PARTS,
    Template,
    adopt,
    begin_dataset,
    drop_batch,
    grow,
    parameters,
    pass_validation,
)

_ACTIVE = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
_MOST_VERSIONS = 2
"""Of a model, after any trial: those that it begins with, and the one that the run makes."""
_DAYS = 100.0
"""By how much a clock has to be wrong, so that everything is old enough to be removed."""


@dataclass(frozen=True)
class Trial:
    """A run that is about to be made, and what must hold once it has ended."""

    dataset: str
    parameters: Mapping[str, object]
    before: str | None = None
    """The champion's version before the run."""
    after: Mapping[str, str] = field(default_factory=dict)
    """The champion's version after a run that ended in a state of this name; else as before."""
    batches: tuple[str, ...] = ()
    """What has arrived."""
    kept: tuple[str, ...] = ()
    """Objects that must still be there."""
    removed: tuple[str, ...] = ()
    """Objects that must be gone if the run ended well."""
    clock_days: float = 0.0


@dataclass(frozen=True)
class Stage:
    """A stage of a run: the deployment whose run passes it, and the task in which it is."""

    deployment: str
    task: str
    begin: Callable[[str, Template], Trial]


def _arrived(dataset: str, _template: Template) -> Trial:
    """A data set that has begun, and a batch that nobody has looked at."""
    pass_validation(begin_dataset(dataset))
    drop_batch(dataset, "good", PARTS.good)
    return Trial(dataset, {"dataset": dataset}, batches=("good",))


def _unvalidated(dataset: str, template: Template) -> Trial:
    begin_dataset(dataset)
    return Trial(dataset, {"dataset": dataset})


def _due(dataset: str, template: Template) -> Trial:
    """A champion, and newer data, on which a candidate is promoted."""
    base = begin_dataset(dataset)
    (champion,) = adopt(base, template, ["promote"])
    pass_validation(base)
    pass_validation(grow(base, PARTS.good))
    return Trial(
        dataset,
        parameters(dataset),
        before=champion.version,
        after={"Promoted": "2"},
    )


def _offered(dataset: str, template: Template) -> Trial:
    """A champion, and a challenger that a person approves."""
    champion, challenger = adopt(begin_dataset(dataset), template, ["promote", "needs-approval"])
    asked = {
        "judgement": "approve",
        "model": champion.name,
        "version": int(challenger.version),
        "reason": "the table of faults approves",
        "who": "the table of faults",
    }
    return Trial(dataset, asked, champion.version, {"Approved": challenger.version})


def _replaced(dataset: str, template: Template) -> Trial:
    """A champion that replaced another, to which a person rolls back."""
    previous, champion = adopt(begin_dataset(dataset), template, ["promote", "promote"])
    asked = {
        "model": champion.name,
        "reason": "the table of faults rolls back",
        "who": "the table of faults",
    }
    return Trial(dataset, asked, champion.version, {"Rolled back": previous.version})


def _old(dataset: str, template: Template) -> Trial:
    """A champion that must stay, and the checkpoints of a run that ended long ago."""
    (champion,) = adopt(begin_dataset(dataset), template, ["promote"])
    store = Store(DEFAULT_STORE)
    folder = keys.checkpoints(template.run.id)
    for number in range(5):
        store.put(keys.checkpoints(template.run.id, f"{dataset}-{number}"), b"planted")
    return Trial(
        dataset,
        {"dry_run": False},
        champion.version,
        kept=tuple(store.names(f"datasets/{dataset}/")),
        removed=(folder,),
        clock_days=_DAYS,
    )


_TRAIN = "train/weekly"
STAGES: dict[str, Stage] = {
    "intake": Stage("ingest/on-arrival", "ingest_batch", _arrived),
    "validation": Stage("ingest/on-arrival", "validate_snapshot", _unvalidated),
    "training": Stage(_TRAIN, "train_model", _due),
    "evaluation": Stage(_TRAIN, "evaluate_models", _due),
    "decision": Stage(_TRAIN, "decide_promotion", _due),
    "registration": Stage(_TRAIN, "register_candidate", _due),
    "alias move": Stage(_TRAIN, "set_champion", _due),
    "report": Stage(_TRAIN, "report_decision", _due),
    "approval": Stage("promote/manual", "approve_challenger", _offered),
    "rollback": Stage("promote/rollback", "roll_back_champion", _replaced),
    "retention": Stage("retain/weekly", "remove", _old),
}


def find_problems(bench: Bench, trial: Trial, run: UUID) -> list[str]:
    """Return a sentence for everything that was lost, doubled, wrong or left behind."""
    state = bench.prefect.read_flow_run(run).state
    name = str(state.name) if state else "no state"
    well = bool(state and state.is_completed())
    return [
        *_batch_problems(trial, well=well),
        *_champion_problems(trial, name),
        *_object_problems(trial, well=well),
        *_run_problems(bench, run),
    ]


def _batch_problems(trial: Trial, *, well: bool) -> list[str]:
    """Every batch is judged, or it waits: once, and not both."""
    store = Store(DEFAULT_STORE)
    judged = [verdict.batch for verdict in read_ledger(store, trial.dataset)]
    folder = keys.incoming(trial.dataset)
    waiting = {name.removeprefix(folder).split("/")[0] for name in store.names(folder)}
    problems = []
    for batch in trial.batches:
        times = judged.count(batch) + (batch in waiting)
        if times != 1:
            problems.append(f"batch {batch} is there {times} times; expected once")
        elif well and batch in waiting:
            problems.append(f"batch {batch} still waits after a run that ended well")
    return problems


def _champion_problems(trial: Trial, state: str) -> list[str]:
    """The champion is the one that the run's end stands for, and the history explains it."""
    if trial.before is None:
        return []
    name = f"{trial.dataset}-cnn"
    champion = read_model(name).aliases.get("champion")
    history = read_history(Store(DEFAULT_STORE), name, read_versions(name), restore=False)
    _, unexplained = trace(history.moves, champion)
    problems = [*history.problems, *unexplained]
    problems += [f"move {move.sequence} is in no object" for move in history.lost]
    right = {trial.after[state]} if state in trial.after else {trial.before, *trial.after.values()}
    if champion not in right:
        expected = " or ".join(sorted(right))
        problems.append(f"after {state} the champion is version {champion}; expected {expected}")
    if (versions := len(read_versions(name))) > _MOST_VERSIONS:
        problems.append(f"{versions} versions are registered; expected {_MOST_VERSIONS} at most")
    return problems


def _object_problems(trial: Trial, *, well: bool) -> list[str]:
    store = Store(DEFAULT_STORE)
    problems = [f"{name} is gone" for name in trial.kept if not store.has(name)]
    if well:
        problems += [f"{prefix} is still there" for prefix in trial.removed if store.names(prefix)]
    return problems


def _run_problems(bench: Bench, run: UUID) -> list[str]:
    """No run that the pair has begun is left; the watch and what it does are not meant."""
    state = FlowRunFilterState(type=FlowRunFilterStateType(any_=_ACTIVE))
    left = bench.prefect.read_flow_runs(flow_run_filter=FlowRunFilter(state=state))
    return [f"{found.name} is still {found.state_name}" for found in left if found.id == run]
