"""The ledger of a data set: the verdict on every batch, which defines the present snapshot.

An entry is one object, written after its shards and before its files are moved: a crash before it
has changed nothing, and after it the next ingest finishes the moves. The present snapshot is the
base and the accepted batches in the order of the ledger, so that no second object has to agree with
it.
"""

import hashlib

from mnist_cnn.record import Record
from tasks import keys
from tasks.datasets.snapshots import extend_snapshot, grow, is_written, read_snapshot
from tasks.records import BatchFile, BatchVerdict, Snapshot
from tasks.services.s3 import Entry, Store

_ENTRIES: dict[tuple[str, str], BatchVerdict] = {}
"""Entries that this process has read, by address and ETag: an entry is never changed."""

_PRESENT: dict[str, tuple[list[BatchVerdict], Snapshot]] = {}
"""The newest snapshot that this process has taken of each base, and the batches accepted by it."""


class _Base(Record):
    snapshot: str


def read_base(store: Store, dataset: str) -> Snapshot | None:
    """Return the base snapshot of a data set; None if no base was accepted yet."""
    try:
        content = store.get(keys.base(dataset))
    except FileNotFoundError:
        return None
    return read_snapshot(store, dataset, _Base.model_validate_json(content).snapshot)


def write_base(store: Store, snapshot: Snapshot) -> None:
    """Make `snapshot` the base of its data set; an existing base stays."""
    name = keys.base(snapshot.dataset)
    if not store.has(name):
        store.put(name, _Base(snapshot=snapshot.digest).model_dump_json().encode())


def read_ledger(store: Store, dataset: str) -> list[BatchVerdict]:
    """Return the verdict on every batch, in order; an entry is read once a process."""
    # A name begins with the sequence number, padded with zeros, so these are in order.
    entries = store.entries(keys.ledger(dataset))
    return [_read_entry(store, entry) for entry in entries if entry.name.endswith(".json")]


def _read_entry(store: Store, entry: Entry) -> BatchVerdict:
    known = store.address_of(entry.name), entry.etag
    if known not in _ENTRIES:
        _ENTRIES[known] = BatchVerdict.model_validate_json(store.get(entry.name))
    return _ENTRIES[known]


def present_snapshot(store: Store, base: Snapshot, ledger: list[BatchVerdict]) -> Snapshot:
    """Return the snapshot of the base and all accepted batches; write it if it is missing."""
    accepted = [verdict for verdict in ledger if verdict.accepted]
    taken, snapshot = _PRESENT.get(base.address, ([], base))
    if accepted[: len(taken)] != taken:
        taken, snapshot = [], base
    new = accepted[len(taken) :]
    snapshots = [snapshot]
    for verdict in new:
        snapshots.append(grow(snapshots[-1], verdict.shards, verdict.arrived))
    # Manifests are written in this order: the newest that exists has all before it. A run that died
    # between a verdict and its manifest leaves the last one missing.
    first = len(new)
    while first and not is_written(store, snapshots[first]):
        first -= 1
    for parent, verdict in zip(snapshots[first:], new[first:], strict=False):
        extend_snapshot(store, parent, verdict.shards, verdict.arrived)
    _PRESENT[base.address] = accepted, snapshots[-1]
    return snapshots[-1]


def write_verdict(store: Store, verdict: BatchVerdict) -> None:
    """Append a verdict to the ledger; from then on it is in force."""
    name = keys.verdict(verdict.dataset, verdict.sequence, verdict.digest)
    store.put(name, verdict.model_dump_json(indent=1).encode())


def settle(store: Store, verdict: BatchVerdict) -> None:
    """Move the files of a judged batch out of `incoming/`, unless they are moved already.

    A file that a producer has replaced since is left: it is part of another batch.
    """
    incoming = keys.incoming(verdict.dataset, verdict.batch)
    present = {entry.name.removeprefix(incoming): entry for entry in store.entries(incoming)}
    for file in verdict.files:
        # With another size or ETag it is not the file that was judged.
        entry = present.get(file.name)
        if entry and (entry.bytes, entry.etag) == (file.bytes, file.etag):
            store.move(entry, folder_of(verdict, keys.kept_file(file.name)))
    # Last: without this marker, the next ingest moves the remaining files.
    store.put(_settled(verdict), b"")


def unsettled(store: Store, ledger: list[BatchVerdict]) -> list[BatchVerdict]:
    """Return the verdicts whose batches have not been moved completely."""
    names = set(store.names(keys.ledger(ledger[0].dataset))) if ledger else set()
    return [verdict for verdict in ledger if _settled(verdict) not in names]


def folder_of(verdict: BatchVerdict, name: str = "") -> str:
    """Return the folder of a judged batch, or the object of that name in it."""
    return keys.judged(
        verdict.dataset, verdict.sequence, verdict.batch, name, accepted=verdict.accepted
    )


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


def _settled(verdict: BatchVerdict) -> str:
    return keys.settled(verdict.dataset, verdict.sequence, verdict.digest)
