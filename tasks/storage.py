"""Everything that is kept in S3: bytes at addresses, and the snapshots of a data set.

    STORE/datasets/NAME/shards/SHA256.parquet     immutable, named by what they hold
    STORE/datasets/NAME/snapshots/SHA256.json     manifests, immutable, written last
    STORE/runs/FLOW_RUN/…                         what one run decided, and why

Endpoint and credentials come from boto3's own variables (`AWS_*`, `AWS_ENDPOINT_URL_S3`).
"""

import hashlib
import io
import json
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING

import numpy as np

from mnist_cnn.digits import CLASSES, SIDE, Digits
from tasks.records import Shard, Snapshot, Split

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from prefect.client.schemas import State

DEFAULT_STORE = "s3://mnist-retraining"
"""Where data and records are kept if a run names no other place."""

SHARD_IMAGES = 10_000
"""Images in a shard: 7.8 MB before compression."""

_DAY = 24 * 3600
_CONTENT_TYPES = {
    "json": "application/json",
    "html": "text/html; charset=utf-8",
    "parquet": "application/vnd.apache.parquet",
    "png": "image/png",
}


class StorageUnreachable(ConnectionError):
    """The S3 server does not answer; worth another try."""


class StorageRefused(PermissionError):
    """The S3 server answers, but not to these credentials or not for this bucket."""


def worth_another_try(_task: object, _run: object, state: "State[object]") -> bool:
    """Tell Prefect to retry what failed to connect, and nothing else."""
    return isinstance(state.result(raise_on_failure=False), ConnectionError)


class Store:
    """A bucket, or a prefix in one, written as `s3://BUCKET[/PREFIX]`.

    Every method raises `StorageUnreachable` or `StorageRefused` with a sentence on what to do.
    """

    def __init__(self, address: str) -> None:
        if not address.startswith("s3://") or not address[5:].strip("/"):
            raise ValueError(
                f"the store is {address!r}; expected s3://BUCKET or s3://BUCKET/PREFIX"
            )
        self.address = address.rstrip("/")
        self.bucket, _, self._prefix = self.address[5:].partition("/")
        with self._speaking():
            self._client = _connect()
        weakref.finalize(self, self._client.close)

    def address_of(self, name: str) -> str:
        """Return the address of the object called `name`."""
        return f"{self.address}/{name}"

    def name_of(self, address: str) -> str:
        """Return the name, in this store, of the object at `address`."""
        name = address.removeprefix(f"{self.address}/")
        if name == address:
            raise ValueError(f"{address} is not in the store {self.address}")
        return name

    def put(self, name: str, content: bytes) -> str:
        """Write an object, whole or not at all, and return its address."""
        kind = _CONTENT_TYPES.get(name.rpartition(".")[2], "application/octet-stream")
        with self._speaking():
            self._client.put_object(
                Bucket=self.bucket, Key=self._key(name), Body=content, ContentType=kind
            )
        return self.address_of(name)

    def get(self, name: str) -> bytes:
        """Read an object; FileNotFoundError names the address that holds nothing."""
        from botocore.exceptions import ClientError  # noqa: PLC0415 - boto3 loads when S3 is used

        with self._speaking():
            try:
                return self._client.get_object(Bucket=self.bucket, Key=self._key(name))[
                    "Body"
                ].read()
            except ClientError as error:
                if error.response["Error"]["Code"] == "NoSuchKey":
                    raise FileNotFoundError(
                        f"{self.address_of(name)} holds nothing; it was removed, or never written"
                    ) from error
                raise

    def modified(self, name: str) -> datetime:
        """Return when an object was written."""
        with self._speaking():
            return self._client.head_object(Bucket=self.bucket, Key=self._key(name))["LastModified"]

    def has(self, name: str) -> bool:
        """Tell whether there is an object called `name`."""
        from botocore.exceptions import ClientError  # noqa: PLC0415

        with self._speaking():
            try:
                self._client.head_object(Bucket=self.bucket, Key=self._key(name))
            except ClientError as error:
                if error.response["Error"]["Code"] == "404":
                    return False
                raise
            return True

    def remove(self, name: str) -> None:
        """Remove an object; one that is not there is no error."""
        with self._speaking():
            self._client.delete_object(Bucket=self.bucket, Key=self._key(name))

    def names(self, prefix: str) -> list[str]:
        """Return the names of all objects under `prefix`, in order."""
        with self._speaking():
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=self._key(prefix)
            )
            cut = len(self._key(""))
            return sorted(
                entry["Key"][cut:] for page in pages for entry in page.get("Contents", [])
            )

    def link(self, name: str) -> str:
        """Return an address that any browser can open for the next seven days."""
        with self._speaking():
            return self._client.generate_presigned_url(
                "get_object",
                Params={"Bucket": self.bucket, "Key": self._key(name)},
                ExpiresIn=7 * _DAY,
            )

    def check(self) -> None:
        """Write an object, read it back, remove it: all that a run will need, before it starts."""
        name, content = "check/write-and-read", b"the store can be written and read"
        self.put(name, content)
        if self.get(name) != content:
            raise StorageRefused(f"{self.address_of(name)} does not hold what was written to it")
        self.remove(name)

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name

    @contextmanager
    def _speaking(self) -> Iterator[None]:
        """Turn what boto3 raises into a sentence: what was got, and what to do."""
        from botocore import exceptions as s3  # noqa: PLC0415

        try:
            yield
        except (s3.NoCredentialsError, s3.PartialCredentialsError) as error:
            raise StorageRefused(
                f"no complete S3 credentials were found ({error}); set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, a profile or an instance role where this run executes"
            ) from error
        except s3.ClientError as error:
            code = error.response["Error"]["Code"]
            if code == "NoSuchBucket":
                raise StorageRefused(
                    f"bucket {self.bucket!r} does not exist; create it, or name another store"
                ) from error
            raise StorageRefused(
                f"S3 refused {error.operation_name} on {self.address} ({code}); check that "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY belong to this server and may read "
                "and write this bucket"
            ) from error
        except (s3.HTTPClientError, s3.EndpointConnectionError) as error:
            raise StorageUnreachable(
                f"the S3 server of {self.address} does not answer ({error}); start it "
                "(`make up` starts the local one) or correct AWS_ENDPOINT_URL_S3"
            ) from error


def _connect() -> "S3Client":
    from boto3.session import Session  # noqa: PLC0415
    from botocore.config import Config  # noqa: PLC0415

    patience = Config(
        connect_timeout=5,
        read_timeout=60,
        retries={"mode": "standard", "total_max_attempts": 3},
        signature_version="s3v4",  # boto3 still signs links with version 2 if it is not told
    )
    # A session of its own: boto3's default one would keep the first credentials that it ever saw.
    return Session().client("s3", config=patience)


def write_snapshot(
    store: Store, dataset: str, train: Digits, test: Digits, origin: str
) -> Snapshot:
    """Store both splits as shards and then, last, the manifest; what is there is not sent again.

    The manifest holds no time and no address, so that the same data has the same digest anywhere.
    """
    shards = {
        split: [
            _write_shard(store, dataset, digits.part(start, start + SHARD_IMAGES), origin)
            for start in range(0, len(digits), SHARD_IMAGES)
        ]
        for split, digits in (("train", train), ("test", test))
    }
    manifest = {
        "format": 1,
        "dataset": dataset,
        "parent": None,
        **{split: [shard.model_dump() for shard in shards[split]] for split in shards},
    }
    content = json.dumps(manifest, sort_keys=True, indent=1).encode()
    digest = hashlib.sha256(content).hexdigest()
    snapshot = Snapshot(dataset=dataset, store=store.address, digest=digest, **shards)
    name = store.name_of(snapshot.address)
    if not store.has(name):
        store.put(name, content)
    return snapshot


def read_snapshot(store: Store, dataset: str, digest: str) -> Snapshot:
    """Read a manifest; FileNotFoundError if there is none, ValueError if it was changed."""
    name = f"datasets/{dataset}/snapshots/{digest}.json"
    content = store.get(name)
    found = hashlib.sha256(content).hexdigest()
    if found != digest:
        raise ValueError(
            f"{store.address_of(name)} has the digest {found}; it was changed after it was "
            "written: restore it from a backup"
        )
    return Snapshot(**json.loads(content) | {"store": store.address, "digest": digest})


def read_split(snapshot: Snapshot, split: Split) -> Digits:
    """Read one split into memory; ValueError if a shard no longer holds what its name says."""
    import pyarrow.parquet as pq  # noqa: PLC0415

    store = Store(snapshot.store)
    total = snapshot.images(split)
    images = np.empty((total, SIDE, SIDE), np.uint8)
    labels = np.empty(total, np.int64)
    start = 0
    for shard in snapshot.shards(split):
        name = _shard_name(snapshot.dataset, shard.digest)
        table = pq.read_table(io.BytesIO(store.get(name)))
        pixels = table["image"].combine_chunks().buffers()[1]
        part = Digits(
            np.frombuffer(pixels, np.uint8, table.num_rows * SIDE * SIDE).reshape(-1, SIDE, SIDE),
            table["label"].to_numpy().astype(np.int64),
        )
        if part.digest() != shard.digest:
            raise ValueError(
                f"{store.address_of(name)} holds data with digest {part.digest()}; it was changed "
                "after it was accepted: restore it from a backup"
            )
        images[start : start + len(part)] = part.images
        labels[start : start + len(part)] = part.labels
        start += len(part)
    return Digits(images, labels)


def _write_shard(store: Store, dataset: str, digits: Digits, origin: str) -> Shard:
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.parquet as pq  # noqa: PLC0415

    shard = Shard(
        digest=digits.digest(),
        images=len(digits),
        labels=np.bincount(digits.labels, minlength=CLASSES).tolist(),
        origin=origin,
    )
    name = _shard_name(dataset, shard.digest)
    if not store.has(name):
        pixels = pa.py_buffer(np.ascontiguousarray(digits.images))
        binary = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(SIDE * SIDE), len(digits), [None, pixels]
        )
        table = pa.table({"image": binary, "label": digits.labels.astype(np.uint8)})
        content = io.BytesIO()
        pq.write_table(table, content, compression="zstd", use_dictionary=False)
        store.put(name, content.getvalue())
    return shard


def _shard_name(dataset: str, digest: str) -> str:
    return f"datasets/{dataset}/shards/{digest}.parquet"
