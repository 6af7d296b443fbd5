"""Verify the history of every model once a day, and report the broken ones.

A step of its own, because it needs MLflow, which may be away: that fails nothing here. The last
check of each is stored, and since when one is unreadable.
"""

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta

from prefect import get_run_logger
from prefect.client.orchestration import get_client
from pydantic import BaseModel, Field, ValidationError

from mnist_cnn.record import Record
from tasks import keys
from tasks.registry.aliases import verify_history
from tasks.registry.versions import Refused
from tasks.services.clock import server_time
from tasks.services.lock import Busy
from tasks.services.mlflow import RegistryError, RegistryUnreachable
from tasks.services.s3 import Store
from tasks.services.step import step
from tasks.watch.messages import Situation, UnreadHistory, compose
from tasks.watch.notifications import Outbox, find_recipients

_EVERY = timedelta(days=1)
_AGAIN = timedelta(hours=1)
"""After a failure: MLflow's client itself waits for minutes where the server is away."""


class Check(BaseModel, frozen=True):
    """The last attempt to verify the history of a model."""

    tried: datetime
    unread_since: datetime | None = None
    reason: str = ""

    def is_due(self, now: datetime) -> bool:
        """Return True if it is time to verify it again."""
        return now - self.tried >= (_AGAIN if self.unread_since else _EVERY)


class Checks(Record):
    """The last check of each model, by its name."""

    models: dict[str, Check] = Field({})


@step
def notify_of_histories(store: str) -> list[str]:
    """Verify the histories that are due and report broken ones; return the subjects and failures.

    A history that cannot be read is logged and retried an hour later; people are notified after a
    day.
    """
    s3 = Store(store)
    checks = _read_checks(s3)
    with get_client(sync_client=True) as prefect:
        now = server_time(prefect)
        recipients = find_recipients(prefect)
    models = find_models(s3)
    due = [model for model in models if _is_due(checks.models.get(model), now)]
    if not recipients or not due:
        return []
    broken, failed = verify_histories(s3, due)
    checks = note_checks(checks, due, failed, now)
    # A model whose history was removed from the store keeps its check, but is not reported.
    unread = [each for each in find_unread(checks) if each.model in models]
    situation = Situation(now=now, broken=broken, unread=tuple(unread))
    sent = Outbox(recipients, s3, now).send(compose(situation))
    # Last: a step that dies before it is repeated, and no message is lost.
    s3.put(keys.HISTORIES_VERIFIED, checks.model_dump_json(indent=1).encode())
    for model, reason in failed.items():
        get_run_logger().warning(
            "the history of %s was not verified, and is tried again in an hour: %s", model, reason
        )
    sentences = [f"the history of {model} was not verified" for model in failed]
    return [*(message.subject for message in sent), *sentences]


def find_models(store: Store) -> list[str]:
    """Return the models that have a history in the store."""
    return sorted(store.folders(keys.MODELS))


def verify_histories(store: Store, models: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the problems of each broken history, and the reason for each unreadable one.

    A registry that is away is tried once: its client waits for minutes each time.
    """
    broken = dict[str, str]()
    unread = dict[str, str]()
    away = ""  # the reason, once the registry was found to be away
    for model in models:
        if away:
            unread[model] = away
            continue
        try:
            _, _, problems = verify_history(model, store)
        except Refused as refusal:
            problems = [f"it has a history, but {refusal}"]
        except (RegistryError, Busy) as error:
            unread[model] = str(error)
            away = str(error) if isinstance(error, RegistryUnreachable) else ""
            continue
        if problems:
            broken[model] = "; ".join(problems)
    return broken, unread


def note_checks(
    before: Checks, tried: Iterable[str], failed: Mapping[str, str], now: datetime
) -> Checks:
    """Return the checks after an attempt; a failing one keeps the time of its first failure."""
    known = dict(before.models)
    for model in tried:
        since = known[model].unread_since if model in known else None
        known[model] = (
            Check(tried=now, unread_since=since or now, reason=failed[model])
            if model in failed
            else Check(tried=now)
        )
    return Checks(models=known)


def find_unread(checks: Checks) -> list[UnreadHistory]:
    """Return the histories that could not be read in the last attempt."""
    return [
        UnreadHistory(model, check.unread_since, check.reason)
        for model, check in sorted(checks.models.items())
        if check.unread_since
    ]


def _is_due(check: Check | None, now: datetime) -> bool:
    return check is None or check.is_due(now)


def _read_checks(store: Store) -> Checks:
    try:
        return Checks.model_validate_json(store.get(keys.HISTORIES_VERIFIED))
    except (FileNotFoundError, ValidationError):  # then all histories are verified now
        return Checks()
