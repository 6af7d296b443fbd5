"""The ledger of a data set: what became of every batch, and so what the data set consists of.

    STORE/datasets/NAME/incoming/BATCH/…             dropped by producers
    STORE/datasets/NAME/base.json                    which snapshot everything else is added to
    STORE/datasets/NAME/ledger/000007-SHA256.json    the verdict on a batch: what counts
    STORE/datasets/NAME/ledger/000007-SHA256.settled its files have been moved
    STORE/datasets/NAME/accepted/000007-BATCH/…      the report, and under files/ what came
    STORE/datasets/NAME/quarantine/000008-BATCH/…    likewise, with reason.json

An entry is one object, written once its shards are there, and its files move afterwards: whatever
dies before it has changed nothing, whatever dies after it is finished by the next ingest. The
present snapshot is the base and the accepted batches in the order of the ledger, so that no second
object has to agree with it.
"""

import hashlib
from urllib.parse import quote

from pydantic import BaseModel

from tasks.datasets.snapshots import extend_snapshot, read_snapshot
from tasks.records import BatchFile, Snapshot, Verdict
from tasks.services.s3 import Entry, Store


class _Base(BaseModel, frozen=True):
    snapshot: str


def read_base(store: Store, dataset: str) -> Snapshot | None:
    """Return the snapshot that a data set began with; None if nothing was accepted yet."""
    try:
        content = store.get(_base_name(dataset))
    except FileNotFoundError:
        return None
    return read_snapshot(store, dataset, _Base.model_validate_json(content).snapshot)


def write_base(store: Store, snapshot: Snapshot) -> None:
    """Let a data set begin with `snapshot`, if it has not begun."""
    if not store.has(_base_name(snapshot.dataset)):
        content = _Base(snapshot=snapshot.digest).model_dump_json()
        store.put(_base_name(snapshot.dataset), content.encode())


def read_ledger(store: Store, dataset: str) -> list[Verdict]:
    """Return the verdict on every batch, in order."""
    names = store.names(_ledger(dataset))
    return [
        Verdict.model_validate_json(store.get(name)) for name in names if name.endswith(".json")
    ]


def present_snapshot(store: Store, base: Snapshot, ledger: list[Verdict]) -> Snapshot:
    """Return the snapshot of the base and all accepted batches, and write what of it is missing."""
    snapshot = base
    for verdict in ledger:
        if verdict.accepted:
            snapshot = extend_snapshot(store, snapshot, verdict.shards, verdict.arrived)
    return snapshot


def write_verdict(store: Store, verdict: Verdict) -> None:
    """Make a verdict count."""
    store.put(f"{_stem(verdict)}.json", verdict.model_dump_json(indent=1).encode())


def settle(store: Store, verdict: Verdict) -> None:
    """Move a judged batch to where it belongs, as far as that is not done yet.

    A file that a producer has written anew since is left: it is part of another batch.
    """
    incoming = incoming_folder(verdict.dataset, verdict.batch)
    there = {entry.name.removeprefix(incoming): entry for entry in store.entries(incoming)}
    for file in verdict.files:
        entry = there.get(file.name)
        if entry and (entry.bytes, entry.etag) == (file.bytes, file.etag):
            store.move(entry, f"{folder_of(verdict)}files/{_plain(file.name)}")
    store.put(f"{_stem(verdict)}.settled", b"")


def unsettled(store: Store, ledger: list[Verdict]) -> list[Verdict]:
    """Return the verdicts whose batches were not moved to the end."""
    names = set(store.names(_ledger(ledger[0].dataset))) if ledger else set()
    return [verdict for verdict in ledger if f"{_stem(verdict)}.settled" not in names]


def folder_of(verdict: Verdict) -> str:
    """Return where the files of a judged batch, its report and its reason are kept.

    The files lie in a folder of their own, since a producer may call one `reason.json`.
    """
    where = "accepted" if verdict.accepted else "quarantine"
    name = f"{verdict.sequence:06d}-{_plain(verdict.batch)}"
    return f"datasets/{verdict.dataset}/{where}/{name}/"


def incoming_folder(dataset: str, batch: str = "") -> str:
    """Return where producers drop a batch, or all of them."""
    return f"datasets/{dataset}/incoming/{batch}{'/' if batch else ''}"


def files_of(folder: str, entries: list[Entry]) -> list[BatchFile]:
    """Return the files of a batch, named relative to its folder."""
    return [
        BatchFile(name=entry.name.removeprefix(folder), bytes=entry.bytes, etag=entry.etag)
        for entry in entries
    ]


def digest_files(files: list[BatchFile], contents: dict[str, bytes] | None) -> str:
    """Return the SHA-256 of names and contents; of files that were not read, of their ETags."""
    total = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.name):
        content = contents[file.name] if contents is not None else file.etag.encode()
        total.update(f"{file.name}\0{len(content)}\0".encode() + hashlib.sha256(content).digest())
    return total.hexdigest()


def _plain(name: str) -> str:
    """Return a name in which no character and no dot means anything to a file system."""
    parts = [quote(part, safe="") for part in name.split("/")]
    return "/".join(part.replace(".", "%2E") if not part.strip(".") else part for part in parts)


def _base_name(dataset: str) -> str:
    return f"datasets/{dataset}/base.json"


def _ledger(dataset: str) -> str:
    return f"datasets/{dataset}/ledger/"


def _stem(verdict: Verdict) -> str:
    return f"{_ledger(verdict.dataset)}{verdict.sequence:06d}-{verdict.digest}"
