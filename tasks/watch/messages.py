"""Messages about models, data and runs: one for each event or fault, composed by pure functions.

No message is sent for a champion that was kept, a run that was skipped or overtaken, batches that
were accepted, or the runs that send the messages, whose failures the server itself reports.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import chain
from typing import Literal

from pydantic import BaseModel

from tasks.records import BatchVerdict, RunSummary
from tasks.runs.states import GIVEN_UP
from tasks.services.addresses import without_credentials

Severity = Literal["info", "success", "warning", "failure"]

NEWS: dict[str, Severity] = {
    "Promoted": "success",
    "Approved": "success",
    "Awaiting approval": "warning",
    "Rolled back": "warning",
}
"""Names of the states of type COMPLETED that are worth a message."""

WATCH_FLOW = "watch"
"""Name of the flow that sends the messages."""

DROUGHT = timedelta(days=8)
"""Time that a data set may be without a successful training: a week, and a day of grace.

Longer where its schedule is sparser.
"""

_UNREAD = timedelta(days=1)
"""Time that a history may be unreadable: MLflow is away now and then."""

_RESUME_GRACE = timedelta(minutes=15)
"""A crashed run is resumed within this time, or not at all."""
_SCHEDULE_GRACE = timedelta(minutes=10)
"""A schedule that was just made or changed has its runs by then."""

_REASON_LENGTH = 900
_BODY_LENGTH = 1800
"""Discord refuses more than 2,000 characters."""
_SHORT_LENGTH = 140
"""Of the subject or body of a short form: about the length of a text message."""

_LINKS = ("approval form", "Prefect run", "MLflow run", "registered version", "validation report")
"""Links of a run's summary that a message contains, the most useful first."""


class Message(BaseModel, frozen=True):
    """A notification that is sent once."""

    key: str
    """Identity of the event or fault: composed again later, the message has the same key."""
    subject: str
    body: str
    severity: Severity
    facts: dict[str, str]
    """The same for programs: flat, without unknown values."""


@dataclass(frozen=True)
class EndedRun:
    """A flow run of this project in a final state; a crashed one may still be resumed."""

    id: str
    name: str
    flow: str
    type: str
    """Type of its state: COMPLETED, FAILED or CRASHED."""
    state: str
    """Name of its state."""
    reason: str
    since: datetime
    url: str
    dataset: str | None
    attempt: int = 1
    """Number of starts of the run: each repeat that a person starts has a message of its own."""
    summary: RunSummary | None = None


@dataclass(frozen=True)
class Training:
    """The state of training on one data set."""

    dataset: str
    scheduled: bool
    """True if an active schedule trains on it."""
    since: datetime
    """Time at which a training was first due, as far as is known."""
    attempted: datetime | None
    """Start of the latest run."""
    succeeded: datetime | None
    """End of the latest successful run."""
    limit: timedelta = DROUGHT
    """Time that it may be without a successful run."""


@dataclass(frozen=True)
class IdleSchedule:
    """An active schedule without a run that is due in the future."""

    deployment: str
    schedule: str
    changed: datetime
    last: datetime | None
    """Time at which its last run was due."""


@dataclass(frozen=True)
class UnreadHistory:
    """A model's history that could not be read, and so not be verified."""

    model: str
    since: datetime
    reason: str


@dataclass(frozen=True)
class Situation:
    """The events and faults from which messages are composed."""

    now: datetime
    runs: tuple[EndedRun, ...] = ()
    refused: tuple[BatchVerdict, ...] = ()
    """Verdicts on quarantined batches for which no message was sent."""
    trainings: tuple[Training, ...] = ()
    idle: tuple[IdleSchedule, ...] = ()
    broken: Mapping[str, str] = field(default_factory=dict)
    """The problems of the histories that are broken, by registered model."""
    unread: tuple[UnreadHistory, ...] = ()


def compose(situation: Situation) -> list[Message]:
    """Return the messages for a situation, including those that were sent before."""
    now = situation.now
    messages = chain(
        (about_run(run, key) for run in situation.runs if (key := key_of(run, now))),
        _about_batches(situation.refused),
        (_about_drought(each, now) for each in situation.trainings if _lacks_training(each, now)),
        (_about_schedule(each) for each in situation.idle if now - each.changed > _SCHEDULE_GRACE),
        (_about_history(model, problems) for model, problems in situation.broken.items()),
        _about_unread([each for each in situation.unread if now - each.since > _UNREAD], now),
    )
    # Two runs may report the same broken history: one message of each key stays.
    return list({message.key: message for message in messages}.values())


def key_of(run: EndedRun, now: datetime) -> str | None:
    """Return the key of the message about a run; None if there is none, or none yet.

    A crashed run is resumed by watch/always, so it is a fault only after that has given it up, or
    if that does not run.
    """
    if run.flow == WATCH_FLOW:
        return None
    if run.type == "COMPLETED":
        return f"{run.id}-{_plain(run.state)}" if run.state in NEWS else None
    if run.type == "CRASHED" and run.state != GIVEN_UP and now - run.since <= _RESUME_GRACE:
        return None
    # The key of the daily check, so that one broken history makes one message.
    if run.state == "History broken":
        return _history_key(_model(run), run.reason)
    return f"{run.id}-failed-{run.attempt}" if run.type in {"FAILED", "CRASHED"} else None


def about_run(run: EndedRun, key: str) -> Message:
    """Compose the message about a run for which `key_of` returns a key."""
    model = _model(run)
    summary = run.summary
    version = summary.version.rpartition("/")[2] if summary and summary.version else None
    if run.type == "COMPLETED":
        kind = _plain(run.state)
        subject = f"{run.state}: {model}"
        subject += f" version {version}" if version else ""
    else:
        kind = "failed"
        subject = f"{run.state}: {run.flow} of {run.dataset or run.name}"
    reason = summary.reason if summary else run.reason
    return _message(
        key,
        subject,
        [_cut(reason, _REASON_LENGTH)],
        severity=NEWS.get(run.state, "failure"),
        links={"Prefect run": run.url} | (summary.links if summary else {}),
        facts={
            "kind": kind,
            "verdict": run.state,
            "dataset": run.dataset,
            "model": model,
            "model_version": version,
            "flow": run.flow,
            "run": run.id,
        },
    )


def _about_batches(refused: Iterable[BatchVerdict]) -> Iterator[Message]:
    """Compose one message for all quarantined batches of a data set."""
    of_dataset: dict[str, list[BatchVerdict]] = {}
    for verdict in refused:
        of_dataset.setdefault(verdict.dataset, []).append(verdict)
    for dataset, verdicts in of_dataset.items():
        ordered = sorted(verdicts, key=lambda verdict: verdict.sequence)
        many = f"{len(ordered)} batches" if len(ordered) > 1 else f"batch {ordered[0].batch!r}"
        # The reasons share the room for one; each keeps a readable beginning.
        each = max(80, _REASON_LENGTH // len(ordered))
        yield _message(
            key_of_batches(dataset, ordered[-1].sequence),
            f"Batches quarantined: {many} of {dataset}",
            [_cut(f"{verdict.batch!r}: {verdict.reason}", each) for verdict in ordered],
            severity="warning",
            facts={
                "kind": "batches-quarantined",
                "verdict": "Batches quarantined",
                "dataset": dataset,
                "batches": ", ".join(verdict.batch for verdict in ordered),
            },
        )


def key_of_batches(dataset: str, last: int) -> str:
    """Return the key of the message about batches up to position `last` of the ledger."""
    return f"quarantined-{dataset}-{last:06d}"


def last_batches(keys: Iterable[str]) -> dict[str, int]:
    """Return the last ledger position whose quarantine was reported, for each data set."""
    last: dict[str, int] = {}
    for key in keys:
        if found := re.fullmatch(r"quarantined-(.+)-(\d{6,})", key):
            last[found[1]] = max(last.get(found[1], 0), int(found[2]))
    return last


def _lacks_training(training: Training, now: datetime) -> bool:
    recent = training.attempted is not None and now - training.attempted < DROUGHT
    # Without a schedule, a run of the last days shows that somebody still trains on the data set.
    wanted = training.scheduled or recent
    return wanted and now - (training.succeeded or training.since) > training.limit


def _about_drought(training: Training, now: datetime) -> Message:
    since = training.succeeded or training.since
    days = (now - since).days
    times = (now - since).total_seconds() // training.limit.total_seconds()
    did = (
        f"The last that did ended {since:%Y-%m-%d %H:%M} UTC" if training.succeeded else "None did"
    )
    began = f"{training.attempted:%Y-%m-%d %H:%M} UTC" if training.attempted else "never"
    return _message(
        # Once for each limit, by default eight days, that it lasts.
        f"not-trained-{training.dataset}-{since:%Y-%m-%d}-{times:.0f}",
        f"Not trained for {days} days: {training.dataset}",
        [
            f"No training of {training.dataset} ended well for {days} days. {did}.",
            f"The last run began: {began}. Look at the runs of train/weekly and at its schedule.",
        ],
        severity="failure",
        facts={"kind": "not-trained", "dataset": training.dataset, "days": str(days)},
    )


def _about_schedule(idle: IdleSchedule) -> Message:
    last = f"the last was due {idle.last:%Y-%m-%d %H:%M} UTC" if idle.last else "it never made one"
    return _message(
        f"no-runs-{_plain(idle.deployment)}-{_plain(idle.schedule)}-"
        f"{(idle.last or idle.changed):%Y-%m-%dT%H-%M}",
        f"No run is due: {idle.deployment}",
        [
            f"The schedule {idle.schedule!r} of {idle.deployment} makes no runs; {last}.",
            "Look for its scheduler in the log of the Prefect server.",
        ],
        severity="failure",
        facts={"kind": "no-runs", "deployment": idle.deployment, "schedule": idle.schedule},
    )


def _about_history(model: str, problems: str) -> Message:
    return _message(
        _history_key(model, problems),
        f"History broken: {model}",
        [_cut(problems, _REASON_LENGTH), "promote/history shows every move of the champion."],
        severity="failure",
        facts={"kind": "failed", "verdict": "History broken", "model": model},
    )


def _about_unread(unread: list[UnreadHistory], now: datetime) -> Iterator[Message]:
    """Compose one message for all unreadable histories, since as a rule MLflow is away."""
    if unread:
        since = min(each.since for each in unread)
        days = max(1, (now - since).days)
        reasons = dict.fromkeys(each.reason for each in unread)
        each_length = max(80, _REASON_LENGTH // len(reasons))
        yield _message(
            f"histories-unread-{since:%Y-%m-%dT%H-%M}",
            f"History not verified for {days} day{'s' if days > 1 else ''}: "
            + _cut(", ".join(each.model for each in unread), 100),
            [_cut(reason, each_length) for reason in reasons],
            severity="warning",
            facts={"kind": "not-verified", "model": ", ".join(each.model for each in unread)},
        )


def shorten(message: Message) -> Message:
    """Return a message of the subject and one link, for a recipient that refuses long ones."""
    links = {name: value for name, value in message.facts.items() if name.startswith("link_")}
    link = links.get("link_prefect_run") or next(iter(links.values()), None)
    kept = ("kind", "dataset", "model", "model_version", "run")
    return message.model_copy(
        update={
            "subject": _cut(message.subject, _SHORT_LENGTH),
            "body": link or _cut(message.body, _SHORT_LENGTH),
            "facts": {name: message.facts[name] for name in kept if name in message.facts},
        }
    )


def _history_key(model: str | None, problems: str) -> str:
    return f"history-{model}-{hashlib.sha256(problems.encode()).hexdigest()[:12]}"


def _message(
    key: str,
    subject: str,
    paragraphs: list[str],
    *,
    severity: Severity,
    facts: Mapping[str, str | None],
    links: Mapping[str, str] | None = None,
) -> Message:
    """Build a message; a link that does not fit is left out, and the most useful have priority.

    It quotes errors, and those of libraries may quote an address with credentials: these are
    removed.
    """
    body = without_credentials("\n".join(paragraphs))
    known = {name: links[name] for name in _LINKS if name in links} if links else {}
    for name, address in known.items():
        line = f"\n{name}: {address}"
        body += line if len(body) + len(line) <= _BODY_LENGTH else ""
    given = {name: without_credentials(value) for name, value in facts.items() if value}
    given |= {f"link_{_plain(name, '_')}": address for name, address in known.items()}
    return Message(key=key, subject=subject, body=body, severity=severity, facts=given)


def _model(run: EndedRun) -> str | None:
    dataset = run.summary.dataset if run.summary else run.dataset
    return f"{dataset}-cnn" if dataset else None


def _plain(name: str, between: str = "-") -> str:
    """Return a name in lower-case letters, digits and the separator `between`."""
    return re.sub(r"[^a-z0-9]+", between, name.lower()).strip(between)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
