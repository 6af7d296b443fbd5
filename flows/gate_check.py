"""Prove that the gates of the weekly run refuse the faults that they are there for."""

from prefect import flow, runtime
from prefect.client.schemas import State
from prefect.states import Completed, Failed

from mnist_cnn.promotion import PromotionPolicy
from tasks import keys
from tasks.datasets.catalog import entry_of
from tasks.gate_check.gates import (
    check_decisions,
    check_loading,
    clear,
    copy_snapshot,
    judge_validation,
    poison,
    report_gates,
)
from tasks.promote import find_champion
from tasks.runs.attempt import TimeLimit, in_time
from tasks.runs.outcome import once
from tasks.services.s3 import DEFAULT_STORE
from tasks.snapshot import Dataset, take_snapshot
from tasks.validate import validate_snapshot


@flow(name="gate-check", flow_run_name="gates of {dataset}")
@once
@in_time
def check_gates(
    dataset: Dataset = "mnist",
    promotion: PromotionPolicy | None = None,
    store: str = DEFAULT_STORE,
    time_limit_minutes: TimeLimit = 2 * 60,
) -> State[object]:
    """Plant faulty models and poisoned data, and verify that the real gates refuse each of them.

    Args:
        dataset: Data set whose champion the faulty models are made from.
        promotion: Policy to prove; empty: the data set's own.
        store: Address of the store; the check uses a prefix of its own and empties it at the end.
        time_limit_minutes: A run that takes longer is ended, as Timed out.

    """
    # A prefix for each flow run: overlapping checks never remove each other's data.
    scratch = f"{store}/{keys.gate_check(runtime.flow_run.id)}"
    try:
        snapshot = copy_snapshot(take_snapshot(dataset, store), scratch)
        champion = find_champion(snapshot.model_name)
        if champion is None:
            sentence = f"{snapshot.model_name} has no champion to plant faults in: run train/weekly"
            return Failed(name="No champion", message=sentence)
        policy = promotion or entry_of(snapshot.dataset).policy
        results = [*check_decisions(champion, snapshot, policy), check_loading(champion)]
        for name, poisoned in poison(snapshot).items():
            results.append(judge_validation(name, validate_snapshot(poisoned)))
        report_gates(results)
    finally:
        clear(scratch)
    if broken := [result for result in results if not result.holds]:
        sentences = [f"{result.planted}: {result.found}" for result in broken]
        return Failed(name="A gate is open", message="; ".join(sentences))
    return Completed(name="Gates hold", message=f"{len(results)} of {len(results)} as expected")
