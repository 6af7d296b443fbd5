"""The weekly run, from data to a promoted model."""

from typing import Annotated

from prefect import flow, runtime
from prefect.client.schemas import State
from prefect.states import Completed, Failed
from pydantic import Field

from flows.ingest import QuietMinutes, take_in
from mnist_cnn.device import Device
from mnist_cnn.promotion import PromotionPolicy
from mnist_cnn.training import TrainingConfig
from tasks.cards.publish import publish_cards
from tasks.datasets.catalog import entry_of
from tasks.decide import decide_promotion
from tasks.evaluate import evaluate_models
from tasks.preflight import check_services
from tasks.promote import (
    find_champion,
    find_opponents,
    link_version,
    register_candidate,
    set_challenger,
    set_champion,
)
from tasks.records import RejectedSnapshot
from tasks.registry.fingerprint import fingerprint
from tasks.report import report_decision, report_rejection, report_skip
from tasks.runs.attempt import TimeLimit, in_time
from tasks.runs.outcome import once
from tasks.runs.turn import in_turn
from tasks.services.s3 import DEFAULT_STORE
from tasks.skip import find_repeat
from tasks.snapshot import Dataset
from tasks.train import train_model

Processes = Annotated[int, Field(ge=1, le=64)]

_COMPARISONS = 3
"""Comparisons with a champion that is replaced meanwhile, after which the run gives up."""


def name_run() -> str:
    """Name a run after its data set and the time that it was scheduled for."""
    run = runtime.flow_run
    return f"{run.parameters['dataset']}-{run.scheduled_start_time:%Y-%m-%d-%H%M}"


@flow(name="train", flow_run_name=name_run)
@once
@in_turn
@in_time
def train(
    dataset: Dataset = "mnist",
    training: TrainingConfig = TrainingConfig(),
    promotion: PromotionPolicy | None = None,
    store: str = DEFAULT_STORE,
    device: Device = "auto",
    processes: Processes = 1,
    quiet_minutes: QuietMinutes = 10,
    time_limit_minutes: TimeLimit = 6 * 60,
    *,
    force: bool = False,
) -> State[object]:
    """Take in new data, retrain, and promote the result if it is proved to be no worse.

    Args:
        dataset: `mnist`, `digits` (the embedded sample), `auto` (MNIST if it can be downloaded),
            or a data set of your own.
        training: Configuration of the training of the CNN.
        promotion: Policy that the candidate has to pass; empty: the data set's own.
        store: Address of data and records, `s3://BUCKET` or `s3://BUCKET/PREFIX`.
        device: `auto` takes cuda, else mps, else cpu.
        processes: More than one trains under torchrun, one process for each GPU.
        quiet_minutes: Minutes without a write after which a batch without the marker `_SUCCESS` is
            complete.
        time_limit_minutes: A run that takes longer is ended, as Timed out; waiting for its turn
            does not count.
        force: Train even if the champion was trained on the same data, in the same way.

    """
    check_services(store)
    validated, _, arrived = take_in(dataset, store, quiet_minutes)
    if isinstance(validated, RejectedSnapshot):
        summary = report_rejection(validated)
        return Failed(name=summary.verdict, message=summary.reason)
    snapshot = validated.snapshot
    policy = promotion or entry_of(snapshot.dataset).policy
    made_of = fingerprint(snapshot, training, policy, device, processes)
    champion = find_champion(snapshot.model_name)
    if not force and (repeat := find_repeat(champion, made_of)):
        summary = report_skip(validated, champion, f"{repeat} ({arrived})")
        return Completed(name=summary.verdict, message=summary.reason)
    candidate = train_model(validated, training, device, processes)
    # A promotion stands only against the present champion. If somebody moves the alias during the
    # evaluation, `set_champion` returns False, and the candidate is compared with the new one.
    for _ in range(_COMPARISONS):
        champion, previous = find_opponents(candidate, store)
        known = {"candidate": candidate, "champion": champion, "previous": previous}
        models = {role: version.model for role, version in known.items() if version}
        measured = evaluate_models(models, snapshot)
        ours = measured["candidate"]
        against = (measured["champion"], champion) if champion else None
        decision, record = decide_promotion(ours, against, snapshot, policy)
        version = register_candidate(candidate, ours, decision, record, made_of)
        if decision.verdict != "promote":
            break
        if set_champion(version, champion, decision.reason, store):
            break
    else:
        return Failed(
            name="Champion changed",
            message=f"the champion of {candidate.name} changed during each of {_COMPARISONS} "
            "comparisons; nothing was promoted: find out who moves it, and run again",
        )
    if decision.verdict == "needs-approval":
        set_challenger(version)
    cards = publish_cards(validated, candidate, measured, decision, version)
    summary = report_decision(
        validated, candidate, measured, (decision, record), (version, champion), cards
    )
    link_version(version, summary.links)
    return Completed(name=summary.verdict, message=summary.message)
