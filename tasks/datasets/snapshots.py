"""Snapshots of a data set: immutable lists of shards, which are parts of a split.

Every object is content-addressed, or computed from one that is: a repeat would write the same bytes
to the same name, so that an object that exists is not written again.
"""

import hashlib
import io
import json
from datetime import datetime
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from expectations.image_table import image_table
from expectations.reference import ReferenceProfile, reference_profile
from mnist_cnn.digits import CLASSES, SIDE, Digits
from tasks import keys
from tasks.records import Shard, Snapshot, Split
from tasks.services.s3 import Store

if TYPE_CHECKING:
    import pandas as pd

SHARD_IMAGES = 10_000
"""Maximum number of images in a shard: 7.8 MB before compression."""

_DIGESTS: dict[str, NDArray[np.int64]] = {}
"""Digests of the images that this process has read, by the digest of their shard."""


def write_snapshot(
    store: Store, dataset: str, train: Digits, test: Digits, origin: str
) -> Snapshot:
    """Write both splits as shards and then, last, the manifest, unless they are there already.

    The manifest holds no time and no address, so that the same data has the same digest anywhere.
    """
    table = image_table(train.images, train.labels)
    base = _snapshot(
        store.address,
        dataset,
        write_shards(store, dataset, train, table, origin),
        write_shards(store, dataset, test, image_table(test.images, test.labels), origin),
    )
    # An existing manifest means that its shards and profile exist too: they are written before it.
    if not is_written(store, base):
        _write_manifest(store, base, reference_profile(table))
    return base


def extend_snapshot(
    store: Store,
    parent: Snapshot,
    shards: list[Shard],
    until: datetime,
    table: "pd.DataFrame | None" = None,
) -> Snapshot:
    """Extend `parent` by further training shards, which arrived by `until`; return the snapshot.

    `table` is the image table of the shards; without it they are read and measured again. The test
    split stays that of `parent`.
    """
    grown = grow(parent, shards, until)
    if not is_written(store, grown):
        # Extended, not measured anew: the cost is that of the new images alone.
        profile = read_profile(parent)
        if table is not None:
            profile = profile.extended(table)
        else:
            for shard in shards:
                part = _read_shard(store, parent.dataset, shard)
                profile = profile.extended(image_table(part.images, part.labels))
        _write_manifest(store, grown, profile)
    return grown


def grow(parent: Snapshot, shards: list[Shard], until: datetime) -> Snapshot:
    """Return what `extend_snapshot` returns, without writing it."""
    # Batches need not be accepted in the order of their arrival.
    until = max(until, parent.until or until)
    train = parent.train + shards
    return _snapshot(parent.store, parent.dataset, train, parent.test, parent.digest, until)


def is_written(store: Store, snapshot: Snapshot) -> bool:
    """Return True if the manifest of a snapshot exists, and therefore all that it stands for."""
    return store.has(keys.manifest(snapshot.dataset, snapshot.digest))


def write_shards(
    store: Store, dataset: str, digits: Digits, table: "pd.DataFrame", origin: str
) -> list[Shard]:
    """Write digits as shards with the digests of their image table, unless they are there already.

    `origin` is recorded as the source of the images.
    """
    digests = table[["digest", "near_digest"]].to_numpy(np.int64)  # (N, 2)
    return [
        _write_shard(
            store,
            dataset,
            digits.part(start, start + SHARD_IMAGES),
            digests[start : start + SHARD_IMAGES],
            origin,
        )
        for start in range(0, len(digits), SHARD_IMAGES)
    ]


def read_snapshot(store: Store, dataset: str, digest: str) -> Snapshot:
    """Read a manifest and verify its digest.

    Raises FileNotFoundError if there is none, ValueError if it was changed.
    """
    name = keys.manifest(dataset, digest)
    content = store.get(name)
    found = hashlib.sha256(content).hexdigest()
    if found != digest:
        raise ValueError(
            f"{store.address_of(name)} has the digest {found}; it was changed after it was "
            "written: restore it from a backup"
        )
    return Snapshot(**json.loads(content), store=store.address, digest=digest)


def read_profile(snapshot: Snapshot) -> ReferenceProfile:
    """Read the reference profile: the distribution of the snapshot's training images."""
    store = Store(snapshot.store)
    content = store.get(keys.profile(snapshot.dataset, snapshot.digest))
    return ReferenceProfile.model_validate_json(content)


def read_split(snapshot: Snapshot, split: Split) -> Digits:
    """Read one split into memory; ValueError if a shard does not match its digest."""
    store = Store(snapshot.store)
    total = snapshot.images(split)
    # Filled shard by shard: joining a list of parts would hold every image twice.
    images = np.empty((total, SIDE, SIDE), np.uint8)  # (N, 28, 28)
    labels = np.empty(total, np.int64)  # (N,)
    start = 0
    for shard in snapshot.shards(split):
        part = _read_shard(store, snapshot.dataset, shard)
        images[start : start + len(part)] = part.images
        labels[start : start + len(part)] = part.labels
        start += len(part)
    return Digits(images, labels)


def read_digests(snapshot: Snapshot, split: Split) -> NDArray[np.int64]:
    """Return the exact and the near digest of each image of a split, int64 (N, 2).

    They are those of `image_table`. At 16 bytes an image, the digests of years of batches fit into
    memory: those of a shard, which never change, are read once a process.
    """
    store = Store(snapshot.store)
    for shard in snapshot.shards(split):
        if shard.digest not in _DIGESTS:
            content = store.get(keys.shard_digests(snapshot.dataset, shard.digest))
            _DIGESTS[shard.digest] = np.load(io.BytesIO(content))
    return np.concatenate([_DIGESTS[shard.digest] for shard in snapshot.shards(split)])


def _snapshot(
    store: str,
    dataset: str,
    train: list[Shard],
    test: list[Shard],
    parent: str | None = None,
    until: datetime | None = None,
) -> Snapshot:
    # The digest is that of the manifest, which therefore leaves it out.
    unnamed = Snapshot(
        dataset=dataset,
        store=store,
        digest="",
        train=train,
        test=test,
        parent=parent,
        until=until,
    )
    digest = hashlib.sha256(_manifest(unnamed)).hexdigest()
    return unnamed.model_copy(update={"digest": digest})


def _manifest(snapshot: Snapshot) -> bytes:
    """Return the manifest, byte for byte the same for the same data: its SHA-256 is the name."""
    content = snapshot.model_dump(mode="json", exclude={"store", "digest"})
    return json.dumps(content, sort_keys=True, indent=1).encode()


def _write_manifest(store: Store, snapshot: Snapshot, profile: ReferenceProfile) -> None:
    # The profile first: the manifest makes the snapshot exist.
    content = profile.model_dump_json().encode()
    store.put(keys.profile(snapshot.dataset, snapshot.digest), content)
    store.put(keys.manifest(snapshot.dataset, snapshot.digest), _manifest(snapshot))


def _write_shard(
    store: Store, dataset: str, digits: Digits, digests: NDArray[np.int64], origin: str
) -> Shard:
    import pyarrow as pa
    import pyarrow.parquet as pq

    shard = Shard(
        digest=digits.digest(),
        images=len(digits),
        labels=np.bincount(digits.labels, minlength=CLASSES).tolist(),
        origin=origin,
    )
    name = keys.shard(dataset, shard.digest)
    if not store.has(name):
        # The digests first: a shard that exists has them.
        packed = io.BytesIO()
        np.save(packed, digests)
        store.put(keys.shard_digests(dataset, shard.digest), packed.getvalue())
        # An image is one fixed-size binary value, so Arrow takes the array's memory as it is.
        pixels = pa.py_buffer(np.ascontiguousarray(digits.images))  # (N, 28, 28)
        binary = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(SIDE * SIDE), len(digits), [None, pixels]
        )
        rows = pa.table({"image": binary, "label": digits.labels.astype(np.uint8)})
        content = io.BytesIO()
        pq.write_table(rows, content, compression="zstd", use_dictionary=False)
        store.put(name, content.getvalue())
    return shard


def _read_shard(store: Store, dataset: str, shard: Shard) -> Digits:
    import pyarrow.parquet as pq

    name = keys.shard(dataset, shard.digest)
    table = pq.read_table(io.BytesIO(store.get(name)))
    pixels = table["image"].combine_chunks().buffers()[1]  # buffer 0 is the validity bitmap
    part = Digits(
        # (N * 784,) -> (N, 28, 28), a view of Arrow's memory
        np.frombuffer(pixels, np.uint8, table.num_rows * SIDE * SIDE).reshape(-1, SIDE, SIDE),
        table["label"].to_numpy().astype(np.int64),
    )
    if part.digest() != shard.digest:
        raise ValueError(
            f"{store.address_of(name)} holds data with digest {part.digest()}; it was changed "
            "after it was accepted: restore it from a backup"
        )
    return part
