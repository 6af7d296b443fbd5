"""Promotion by people: approve or reject a challenger, roll back, list the history."""

from typing import Annotated, Literal

from prefect import flow
from prefect.client.schemas import State
from prefect.states import Completed, Failed
from pydantic import Field, StringConstraints

from tasks.evaluate import try_version
from tasks.promote import (
    approve_challenger,
    fix_rollback,
    reject_challenger,
    roll_back_champion,
    show_history,
)
from tasks.registry.history import Account
from tasks.registry.models import ModelUnusable
from tasks.registry.versions import Refused
from tasks.runs.attempt import TimeLimit, in_time
from tasks.runs.outcome import once
from tasks.services.s3 import DEFAULT_STORE

Words = Annotated[str, StringConstraints(min_length=1, pattern=r"\S")]
Number = Annotated[int, Field(ge=1)]


@flow(name="promote", flow_run_name="{judgement} {model} {version}")
@once
@in_time
def judge(
    *,
    judgement: Literal["approve", "reject"],
    version: Number,
    reason: Words,
    who: Words,
    model: Words = "mnist-cnn",
    store: str = DEFAULT_STORE,
    time_limit_minutes: TimeLimit = 60,
) -> State[object]:
    """Approve or reject the challenger. An approval is refused if anything changed since.

    Args:
        judgement: Your decision.
        version: Version that you judged: that of the run in the state Awaiting approval.
        reason: Reason, for the readers of the history.
        who: Your name.
        model: Name of the registered model.
        store: Address of the store with the records.
        time_limit_minutes: A run that takes longer is ended, as Timed out.

    """
    account = Account(who=who, why=reason)
    try:
        if judgement == "reject":
            rejected = reject_challenger(model, version, account, store)
            message = f"{rejected.model} does not become champion; {reason}"
            return Completed(name="Rejected", message=message)
        champion = approve_challenger(model, version, account, store)
    except Refused as refusal:
        return Failed(name="Refused", message=str(refusal))
    return Completed(name="Approved", message=f"the champion is {champion.model}; {reason}")


@flow(name="promote", flow_run_name="roll back {model}")
@once
@in_time
def roll_back(
    reason: Words,
    who: Words,
    to: Number | None = None,
    model: Words = "mnist-cnn",
    store: str = DEFAULT_STORE,
    time_limit_minutes: TimeLimit = 60,
) -> State[object]:
    """Make an earlier champion champion again, after a test that it loads and classifies.

    Args:
        reason: Reason, for the readers of the history.
        who: Your name.
        to: Version that was promoted before; empty: the previous champion.
        model: Name of the registered model.
        store: Address of the store with the records.
        time_limit_minutes: A run that takes longer is ended, as Timed out.

    """
    try:
        target, champion = fix_rollback(model, to, store)
        accuracy = try_version(target, store)
        roll_back_champion(target, champion, Account(who=who, why=reason), store)
    except (Refused, ModelUnusable) as refusal:
        return Failed(name="Refused", message=str(refusal))
    return Completed(
        name="Rolled back",
        message=f"the champion is {target.model}, accuracy {accuracy:.4f}; {reason}",
    )


@flow(name="promote", flow_run_name="history of {model}")
@in_time
def tell_history(
    model: Words = "mnist-cnn",
    store: str = DEFAULT_STORE,
    time_limit_minutes: TimeLimit = 60,
) -> State[object]:
    """List every move of the champion, and verify that none was changed or removed.

    Args:
        model: Name of the registered model.
        store: Address of the store with the records.
        time_limit_minutes: A run that takes longer is ended, as Timed out.

    """
    try:
        moves, problems = show_history(model, store)
    except Refused as refusal:
        return Failed(name="Refused", message=str(refusal))
    if problems:
        return Failed(name="History broken", message="; ".join(problems))
    return Completed(name="History whole", message=f"{moves} moves, each follows the one before")
