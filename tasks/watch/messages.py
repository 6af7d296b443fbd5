"""Messages about a model's life: one for each thing that happened, composed by pure rules.

Quiet are a champion that was kept, a run that was skipped or overtaken, batches that were accepted,
and the runs that send the messages, whose failures the server itself reports.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import chain
from typing import Literal

from pydantic import BaseModel

from tasks.records import RunSummary, Verdict
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
"""How long a data set may be without a training that ends well: a week, and a day of grace.

Longer where its schedule is sparser.
"""

_UNREAD = timedelta(days=1)
"""How long a history may be unreadable: MLflow is away now and then."""

_RESUME_GRACE = timedelta(minutes=15)
"""A crashed run is resumed before that, or nobody resumes it."""
_SCHEDULE_GRACE = timedelta(minutes=10)
"""A schedule that was just made or changed has its runs before that."""

_REASON_LENGTH = 900
_BODY_LENGTH = 1800
"""Discord refuses more than 2,000 characters."""
_SHORT_LENGTH = 140
"""Of a short form, a subject or a body: about what a text message holds."""

_LINKS = ("approval form", "Prefect run", "MLflow run", "registered version", "validation report")
"""Links of a run's summary that a message carries, the most useful first."""


class Message(BaseModel, frozen=True):
    """Something that people are told once."""

    key: str
    """The same for the same fault or news, whenever it is looked at."""
    subject: str
    body: str
    severity: Severity
    facts: dict[str, str]
    """The same for programs: flat, without what is unknown."""


@dataclass(frozen=True)
class EndedRun:
    """A flow run of ours in a state that is final, or that stays unless it is resumed."""

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
    """How often the run began: a person who repeats it wants to know how that ended."""
    summary: RunSummary | None = None


@dataclass(frozen=True)
class Training:
    """How training on one data set goes."""

    dataset: str
    scheduled: bool
    """An active schedule trains on it."""
    since: datetime
    """When it was first due, as far as is known."""
    attempted: datetime | None
    """When a run last began."""
    succeeded: datetime | None
    """When a run last ended well."""
    limit: timedelta = DROUGHT
    """How long it may be without one."""


@dataclass(frozen=True)
class IdleSchedule:
    """An active schedule without a run that is due in the future."""

    deployment: str
    schedule: str
    changed: datetime
    last: datetime | None
    """When its last run was due."""


@dataclass(frozen=True)
class UnreadHistory:
    """The history of a model that could not be read, and so not be verified."""

    model: str
    since: datetime
    reason: str


@dataclass(frozen=True)
class Situation:
    """All that messages are composed from."""

    now: datetime
    runs: tuple[EndedRun, ...] = ()
    refused: tuple[Verdict, ...] = ()
    """Verdicts on batches that were put aside and that nobody was told of."""
    trainings: tuple[Training, ...] = ()
    idle: tuple[IdleSchedule, ...] = ()
    broken: Mapping[str, str] = field(default_factory=dict)
    """What is wrong with the history of a registered model."""
    unread: tuple[UnreadHistory, ...] = ()


def compose(situation: Situation) -> list[Message]:
    """Return the messages that the situation calls for, sent before or not."""
    now = situation.now
    messages = chain(
        (about_run(run, key) for run in situation.runs if (key := key_of(run, now))),
        _about_batches(situation.refused),
        (_about_drought(each, now) for each in situation.trainings if _lacks_training(each, now)),
        (_about_schedule(each) for each in situation.idle if now - each.changed > _SCHEDULE_GRACE),
        (_about_history(model, problems) for model, problems in situation.broken.items()),
        _about_unread([each for each in situation.unread if now - each.since > _UNREAD], now),
    )
    return list({message.key: message for message in messages}.values())


def key_of(run: EndedRun, now: datetime) -> str | None:
    """Return the key of the message about a run; None if there is, or is yet, nothing to tell.

    A run that crashed is resumed by watch/always, so that it is a fault only once that gave it up,
    or did not come.
    """
    if run.flow == WATCH_FLOW:
        return None
    if run.type == "COMPLETED":
        return f"{run.id}-{_plain(run.state)}" if run.state in NEWS else None
    if run.type == "CRASHED" and run.state != GIVEN_UP and now - run.since <= _RESUME_GRACE:
        return None
    if run.state == "History broken":
        return _history_key(_model(run), run.reason)
    return f"{run.id}-failed-{run.attempt}" if run.type in {"FAILED", "CRASHED"} else None


def about_run(run: EndedRun, key: str) -> Message:
    """Compose the message about a run that is worth one, which `key_of` tells."""
    model, summary = _model(run), run.summary
    version = summary.version.rpartition("/")[2] if summary and summary.version else None
    if run.type == "COMPLETED":
        kind, subject = _plain(run.state), f"{run.state}: {model}"
        subject += f" version {version}" if version else ""
    else:
        kind, subject = "failed", f"{run.state}: {run.flow} of {run.dataset or run.name}"
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


def _about_batches(refused: Iterable[Verdict]) -> Iterator[Message]:
    """Compose one message for all batches of a data set that were put aside."""
    of_dataset: dict[str, list[Verdict]] = {}
    for verdict in refused:
        of_dataset.setdefault(verdict.dataset, []).append(verdict)
    for dataset, verdicts in of_dataset.items():
        ordered = sorted(verdicts, key=lambda verdict: verdict.sequence)
        many = f"{len(ordered)} batches" if len(ordered) > 1 else f"batch {ordered[0].batch!r}"
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
    """Return the key of the message about batches up to that place in the ledger."""
    return f"quarantined-{dataset}-{last:06d}"


def last_batches(keys: Iterable[str]) -> dict[str, int]:
    """Return, for each data set, up to which place in its ledger people know what was put aside."""
    last: dict[str, int] = {}
    for key in keys:
        if found := re.fullmatch(r"quarantined-(.+)-(\d{6,})", key):
            last[found[1]] = max(last.get(found[1], 0), int(found[2]))
    return last


def _lacks_training(training: Training, now: datetime) -> bool:
    recent = training.attempted is not None and now - training.attempted < DROUGHT
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
        # Once for each eight days, or what else is its limit, that it goes on.
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
    """Compose one message for all histories that cannot be read: mostly MLflow is away."""
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
    """Return the subject and one link: what a recipient takes that refuses long messages."""
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
    """Put a message together; links that do not fit are left out, the least useful first.

    Errors are quoted in it, and those of other people's libraries may quote an address.
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
    """Return a name of small letters, digits and one other character."""
    return re.sub(r"[^a-z0-9]+", between, name.lower()).strip(between)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
