"""Ingest arriving batches: accept one as shards, or quarantine it with the reason."""

from datetime import timedelta
from typing import TYPE_CHECKING

from prefect import get_run_logger, runtime
from prefect.artifacts import create_table_artifact
from pydantic import BaseModel

from expectations.champion_view import contradictions, worst_contradictions
from expectations.image_table import image_table
from expectations.report_page import render_report
from expectations.validation import ValidationReport, validate_batch
from mnist_cnn.digits import SIDE, Digits
from tasks import keys
from tasks.arrivals.batch_files import MARKER, BadBatch, RawBatch, check_names, parse_batch
from tasks.datasets.ledger import (
    digest_files,
    files_of,
    folder_of,
    present_snapshot,
    read_base,
    read_ledger,
    settle,
    unsettled,
    write_verdict,
)
from tasks.datasets.snapshots import extend_snapshot, read_digests, read_profile, write_shards
from tasks.records import BatchVerdict, Intake, ModelVersion, Snapshot, ValidatedSnapshot
from tasks.registry.models import load_model
from tasks.runs.outcome import read_record, write_record
from tasks.services.events import emit
from tasks.services.lock import exclusive
from tasks.services.s3 import Entry, Store
from tasks.services.step import step

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray


_INTAKE = "intake"


class Arrivals(BaseModel, frozen=True):
    """The batches under `incoming/`, by name."""

    complete: list[str]
    waiting: list[str]
    """Batches without a marker that were written to a short time ago."""
    judged: list[BatchVerdict] = []
    """Verdicts of an earlier attempt of this flow run."""


@step
def find_arrivals(snapshot: Snapshot, quiet_minutes: float) -> Arrivals:
    """Finish the moves of an earlier ingest, and list the batches under `incoming/`.

    A batch is complete once it holds the marker `_SUCCESS`, or nothing was written to it for
    `quiet_minutes`.
    """
    store = Store(snapshot.store)
    dataset = snapshot.dataset
    with exclusive(dataset, "ingest"):
        ledger = _settled_ledger(store, dataset)
    folder = keys.incoming(dataset)
    now = store.time()  # by the server's clock, which dates the objects; ours may be off
    batches: dict[str, list[Entry]] = {}
    for entry in store.entries(folder):
        name, inside, _ = entry.name.removeprefix(folder).partition("/")
        # Files directly under incoming/ form the batch "", which is quarantined.
        batches.setdefault(name if inside else "", []).append(entry)
    complete: list[str] = []
    waiting: list[str] = []
    for name, entries in batches.items():
        marked = any(entry.name == keys.incoming(dataset, name, MARKER) for entry in entries)
        newest = max(entry.modified for entry in entries)
        settled = now - newest >= timedelta(minutes=quiet_minutes)
        (complete if marked or settled else waiting).append(name)
    judged = [verdict for verdict in ledger if verdict.run == runtime.flow_run.id]
    return Arrivals(complete=complete, waiting=waiting, judged=judged)


@step
def ingest_batch(
    snapshot: Snapshot, batch: str, champion: ModelVersion | None
) -> BatchVerdict | None:
    """Judge one batch and move its files; None if another ingest was faster.

    Shards, report and reason are written first, then the verdict, which alone is in force, and last
    the files are moved. A repeat after a crash at any point continues there and returns the same
    verdict.
    """
    logger = get_run_logger()
    store = Store(snapshot.store)
    dataset = snapshot.dataset
    with exclusive(dataset, "ingest"):
        ledger = _settled_ledger(store, dataset)
        folder = keys.incoming(dataset, batch)
        entries = store.entries(folder)
        if not batch:  # the files beside the folders, without those in them
            entries = [entry for entry in entries if "/" not in entry.name.removeprefix(folder)]
        if not entries:
            # Moved by now: either by an earlier attempt of this run, or by another ingest.
            ours = [v for v in ledger if (v.batch, v.run) == (batch, runtime.flow_run.id)]
            return ours[-1] if ours else None
        # Not simply `snapshot`: other batches may have been accepted since the flow took it.
        present = present_snapshot(store, read_base(store, dataset) or snapshot, ledger)
        verdict, table = _judge(store, present, ledger, batch, entries, champion)
        write_verdict(store, verdict)
        emit_verdict(verdict, store.address)
        if verdict.accepted:
            extend_snapshot(store, present, verdict.shards, verdict.arrived, table)
        settle(store, verdict)
    log = logger.info if verdict.accepted else logger.warning
    word = "accepted" if verdict.accepted else "put aside"
    log("batch %r was %s: %s", batch, word, verdict.reason)
    return verdict


@step
def report_ingest(verdicts: list[BatchVerdict], arrivals: Arrivals, store: str) -> str:
    """Publish a table with the verdict on each batch; return the summary as a sentence."""
    s3 = Store(store)
    rows = [
        {
            "batch": verdict.batch or "(no folder)",
            "verdict": "accepted" if verdict.accepted else "quarantined",
            "images": str(verdict.images or "unreadable"),
            "why": verdict.reason,
            "report": f"[report]({s3.link(s3.name_of(verdict.report))})" if verdict.report else "",
            "kept in": s3.address_of(folder_of(verdict)),
        }
        for verdict in verdicts
    ]
    rows += [
        {"batch": name, "verdict": "waits", "why": "it may still be uploaded"}
        for name in arrivals.waiting
    ]
    create_table_artifact(rows, key="batches", description="What became of each batch")
    refused = [verdict for verdict in verdicts if not verdict.accepted]
    parts = [f"{len(verdicts) - len(refused)} accepted"] if verdicts else ["nothing arrived"]
    parts += [f"{verdict.batch!r} quarantined: {verdict.reason}" for verdict in refused]
    parts += [f"{name!r} waits, it may still be uploaded" for name in arrivals.waiting]
    return "; ".join(parts)


@step
def find_intake(store: str) -> Intake | None:
    """Return the intake of an earlier attempt of this flow run; None if there is none."""
    intake = read_record(Store(store), _INTAKE, Intake)
    if intake:
        get_run_logger().info("goes on with the data that an earlier attempt of this run took in")
    return intake


@step
def keep_intake(
    validated: ValidatedSnapshot, verdicts: list[BatchVerdict], told: str, store: str
) -> None:
    """Store the intake of this flow run, so that a resumed run trains on the same data.

    `told` is the summary of the batches.
    """
    intake = Intake(validated=validated, verdicts=verdicts, told=told)
    write_record(Store(store), _INTAKE, intake)


def _settled_ledger(store: Store, dataset: str) -> list[BatchVerdict]:
    """Return the ledger, after finishing the moves of batches that were judged before."""
    ledger = read_ledger(store, dataset)
    for verdict in unsettled(store, ledger):
        get_run_logger().warning("batch %r was judged before; moving it", verdict.batch)
        settle(store, verdict)
        # The crash may have come before the event was emitted. If not, the repeat has the same id.
        emit_verdict(verdict, store.address)
    return ledger


def _judge(
    store: Store,
    present: Snapshot,
    ledger: list[BatchVerdict],
    batch: str,
    entries: list[Entry],
    champion: ModelVersion | None,
) -> "tuple[BatchVerdict, pd.DataFrame | None]":
    """Return the verdict on a batch, and the image table of its new images if it is accepted.

    Shards, report and reason are written before this returns; the verdict itself is not.
    """
    files = files_of(keys.incoming(present.dataset, batch), entries)
    unread = BatchVerdict(
        sequence=len(ledger) + 1,
        dataset=present.dataset,
        batch=batch,
        accepted=False,
        reason="",
        digest=digest_files(files, None),
        arrived=max(entry.modified for entry in entries),
        files=files,
        images=None,
        run=str(runtime.flow_run.id),
    )
    # The cheap checks come first: names and sizes before any download, the digest before parsing.
    try:
        _demand_folder(batch)
        check_names({file.name: file.bytes for file in files})
        contents = {
            file.name: store.get(entry.name) for file, entry in zip(files, entries, strict=True)
        }
        unread = unread.model_copy(update={"digest": digest_files(files, contents)})
        _demand_new(ledger, unread)
        raw = parse_batch(contents)
    except BadBatch as error:
        return _put_aside(store, unread, str(error)), None
    del contents  # frees up to half a gibibyte, unless `raw` is a view of it
    table, report, page = _validate(present, raw, champion, f"Batch {batch}")
    read = unread.model_copy(update={"images": len(raw)})
    if report.critical:
        failures = "; ".join(finding.sentence for finding in report.critical)
        return _put_aside(store, read, failures, page), None
    accepted = read.model_copy(update={"accepted": True})
    # Images that are in the data set already are left out, so that none weighs twice in training.
    new = ~table["known"].to_numpy()
    table = table[new]
    digits = Digits(raw.images, raw.labels)
    if not new.all():  # indexing copies all pixels
        digits = Digits(raw.images[new], raw.labels[new])
    warnings = [finding.sentence for finding in report.warnings]
    return accepted.model_copy(
        update={
            "reason": "; ".join([f"{len(digits)} images", *warnings]),
            "shards": write_shards(store, present.dataset, digits, table, f"batch {batch}"),
            "repeated": int((~new).sum()),
            "report": store.put(folder_of(accepted, "report.html"), page.encode()),
        }
    ), table


def _validate(
    present: Snapshot, raw: RawBatch, champion: ModelVersion | None, title: str
) -> "tuple[pd.DataFrame, ValidationReport, str]":
    """Validate a batch; return its image table, the validation report, and the report's page.

    The table's column `known` marks images that the data set, or an earlier row, already holds.
    """
    import pandas as pd

    table = image_table(raw.images, raw.labels)
    worst: dict[str, list[int]] = {}
    probabilities = _champion_view(champion, raw)
    if probabilities is not None:
        table["champion_contradicts"] = contradictions(probabilities, raw.labels)
        worst["champion_contradicts"] = worst_contradictions(probabilities, raw.labels)
    accepted = read_digests(present, "train")[:, 0]
    holdout = pd.DataFrame(read_digests(present, "test"), columns=["digest", "near_digest"])
    report = validate_batch(
        table, accepted=accepted, holdout=holdout, reference=read_profile(present)
    )

    def caption(row: int) -> str:
        words = f"{row}: labelled {raw.labels[row]}"
        if probabilities is None:
            return words
        predicted = probabilities[row].argmax()
        return f"{words}, the champion says {predicted} ({probabilities[row, predicted]:.0%})"

    page = render_report(report, title, {"arriving images": raw.images}, caption, worst)
    known = table["digest"].isin(accepted) | table["digest"].duplicated()
    return table.assign(known=known), report, page


def _champion_view(champion: ModelVersion | None, raw: RawBatch) -> "NDArray[np.float32] | None":
    """Return the champion's probabilities, float32 (N, 10).

    None without a champion, or if the images are not 28 x 28.
    """
    if champion is None or raw.images.shape[1:] != (SIDE, SIDE):
        return None
    from mnist_cnn.evaluation import predict

    network, _ = load_model(champion.model)
    return predict(network, raw.images)


def _put_aside(
    store: Store, verdict: BatchVerdict, reason: str, page: str | None = None
) -> BatchVerdict:
    """Quarantine a batch: write report and reason into the folder for its files."""
    refused = verdict.model_copy(update={"reason": reason})
    if page is not None:
        report = store.put(folder_of(refused, "report.html"), page.encode())
        refused = refused.model_copy(update={"report": report})
    store.put(folder_of(refused, "reason.json"), refused.model_dump_json(indent=1).encode())
    return refused


def _demand_folder(batch: str) -> None:
    if not batch:
        raise BadBatch(
            "the files lie directly under incoming/; expected a folder for each batch: send them "
            "again as incoming/BATCH/…"
        )


def _demand_new(ledger: list[BatchVerdict], batch: BatchVerdict) -> None:
    """Raise BadBatch if a batch of this name or with these files was accepted before.

    A quarantined batch may be sent again, corrected, under its old name.
    """
    for past in ledger:
        if past.accepted and past.digest == batch.digest:
            raise BadBatch(
                f"the same files were accepted as batch {past.batch!r}, which arrived "
                f"{past.arrived:%Y-%m-%d %H:%M} UTC; nothing of them is taken twice"
            )
        if past.accepted and past.batch == batch.batch:
            raise BadBatch(
                f"another batch of the name {batch.batch!r} was accepted, which arrived "
                f"{past.arrived:%Y-%m-%d %H:%M} UTC; expected a name that was not used: send it "
                "again under another one"
            )


def emit_verdict(verdict: BatchVerdict, store: str) -> None:
    """Emit `batch.accepted` or `batch.quarantined` for a verdict that is in force."""
    emit(
        "batch.accepted" if verdict.accepted else "batch.quarantined",
        f"dataset.{verdict.dataset}",
        f"{store} {verdict.dataset} {verdict.sequence} {verdict.digest}",
        {
            "dataset": verdict.dataset,
            "model": f"{verdict.dataset}-cnn",
            "batch": verdict.batch,
            "digest": verdict.digest,
            "images": verdict.images,
            "store": store,
        },
    )
