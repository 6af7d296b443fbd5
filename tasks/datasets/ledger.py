"""The ledger of a data set: the verdict on every batch, which defines the present snapshot.

    STORE/datasets/NAME/incoming/BATCH/…             dropped by producers
    STORE/datasets/NAME/base.json                    the snapshot that all batches extend
    STORE/datasets/NAME/ledger/000007-SHA256.json    the verdict on a batch, in force
    STORE/datasets/NAME/ledger/000007-SHA256.settled its files have been moved
    STORE/datasets/NAME/accepted/000007-BATCH/…      the report, and under files/ the batch
    STORE/datasets/NAME/quarantine/000008-BATCH/…    likewise, with reason.json

An entry is one object, written after its shards and before its files are moved: a crash before it
has changed nothing, and after it the next ingest finishes the moves. The present snapshot is the
base and the accepted batches in the order of the ledger, so that no second object has to agree with
it.
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
    """Return the base snapshot of a data set; None if no base was accepted yet."""
    try:
        content = store.get(_base_name(dataset))
    except FileNotFoundError:
        return None
    return read_snapshot(store, dataset, _Base.model_validate_json(content).snapshot)


def write_base(store: Store, snapshot: Snapshot) -> None:
    """Make `snapshot` the base of its data set; an existing base stays."""
    if not store.has(_base_name(snapshot.dataset)):
        content = _Base(snapshot=snapshot.digest).model_dump_json()
        store.put(_base_name(snapshot.dataset), content.encode())


def read_ledger(store: Store, dataset: str) -> list[Verdict]:
    """Return the verdict on every batch, in order."""
    # A name begins with the sequence number, padded with zeros, so these are in order.
    names = store.names(_ledger(dataset))
    return [
        Verdict.model_validate_json(store.get(name)) for name in names if name.endswith(".json")
    ]


def present_snapshot(store: Store, base: Snapshot, ledger: list[Verdict]) -> Snapshot:
    """Return the snapshot of the base and all accepted batches; write it if it is missing."""
    snapshot = base
    for verdict in ledger:
        if verdict.accepted:
            snapshot = extend_snapshot(store, snapshot, verdict.shards, verdict.arrived)
    return snapshot


def write_verdict(store: Store, verdict: Verdict) -> None:
    """Append a verdict to the ledger; from then on it is in force."""
    store.put(f"{_stem(verdict)}.json", verdict.model_dump_json(indent=1).encode())


def settle(store: Store, verdict: Verdict) -> None:
    """Move the files of a judged batch out of `incoming/`, unless they are moved already.

    A file that a producer has replaced since is left: it is part of another batch.
    """
    incoming = incoming_folder(verdict.dataset, verdict.batch)
    present = {entry.name.removeprefix(incoming): entry for entry in store.entries(incoming)}
    for file in verdict.files:
        # With another size or ETag it is not the file that was judged.
        entry = present.get(file.name)
        if entry and (entry.bytes, entry.etag) == (file.bytes, file.etag):
            store.move(entry, f"{folder_of(verdict)}files/{_plain(file.name)}")
    # Last: without this marker, the next ingest moves the remaining files.
    store.put(f"{_stem(verdict)}.settled", b"")


def unsettled(store: Store, ledger: list[Verdict]) -> list[Verdict]:
    """Return the verdicts whose batches have not been moved completely."""
    names = set(store.names(_ledger(ledger[0].dataset))) if ledger else set()
    return [verdict for verdict in ledger if f"{_stem(verdict)}.settled" not in names]


def folder_of(verdict: Verdict) -> str:
    """Return the folder of a judged batch: its files, its report and its reason.

    The files lie in a folder of their own, since a producer may call one `reason.json`.
    """
    where = "accepted" if verdict.accepted else "quarantine"
    name = f"{verdict.sequence:06d}-{_plain(verdict.batch)}"
    return f"datasets/{verdict.dataset}/{where}/{name}/"


def incoming_folder(dataset: str, batch: str = "") -> str:
    """Return the folder into which producers drop a batch, or by default all batches."""
    return f"datasets/{dataset}/incoming/{batch}{'/' if batch else ''}"


def files_of(folder: str, entries: list[Entry]) -> list[BatchFile]:
    """Return the files of a batch, named relative to its folder."""
    return [
        BatchFile(name=entry.name.removeprefix(folder), bytes=entry.bytes, etag=entry.etag)
        for entry in entries
    ]


def digest_files(files: list[BatchFile], contents: dict[str, bytes] | None) -> str:
    """Return the SHA-256 of names and contents; with `contents` None, of names and ETags."""
    # Lengths and a digest of each content keep two different sets of files from reading alike.
    total = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.name):
        content = contents[file.name] if contents is not None else file.etag.encode()
        total.update(f"{file.name}\0{len(content)}\0".encode() + hashlib.sha256(content).digest())
    return total.hexdigest()


def _plain(name: str) -> str:
    """Return a name without characters and dots that have a meaning in a file system."""
    parts = [quote(part, safe="") for part in name.split("/")]
    return "/".join(part.replace(".", "%2E") if not part.strip(".") else part for part in parts)


def _base_name(dataset: str) -> str:
    return f"datasets/{dataset}/base.json"


def _ledger(dataset: str) -> str:
    return f"datasets/{dataset}/ledger/"


def _stem(verdict: Verdict) -> str:
    return f"{_ledger(verdict.dataset)}{verdict.sequence:06d}-{verdict.digest}"
