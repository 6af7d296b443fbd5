"""A small S3 client: objects under `s3://BUCKET[/PREFIX]`.

Their names come from tasks/keys.py, endpoint and credentials from boto3's own variables (`AWS_*`,
`AWS_ENDPOINT_URL_S3`).
"""

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from http import HTTPStatus
from typing import TYPE_CHECKING

from tasks import keys
from tasks.services.addresses import without_credentials
from tasks.services.clock import read_date

if TYPE_CHECKING:
    from botocore.loaders import Loader
    from mypy_boto3_s3 import S3Client

STORE_VARIABLE = "RETRAINING_STORE"
"""The variable that names the bucket: s3://BUCKET or s3://BUCKET/PREFIX."""


def default_store() -> str:
    """Return the default address of data and records: that in `RETRAINING_STORE`, if it is set."""
    return os.environ.get(STORE_VARIABLE) or "s3://mnist-retraining"


DEFAULT_STORE = default_store()
"""Default of the flows, from the process that deploys them, whose form shows it, or runs them."""

LINK_LIFE = timedelta(days=7)
"""Lifetime of a link: the longest that signature version 4 allows."""

_CONTENT_TYPES = {
    "json": "application/json",
    "html": "text/html; charset=utf-8",
    "parquet": "application/vnd.apache.parquet",
    "png": "image/png",
}

_SERVER_FAULT = 500
_BUSY = {"SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "RequestLimitExceeded"}
"""Codes of S3 errors that a retry may not meet; the same holds for a status of 429 or from 500."""


class StorageUnreachable(ConnectionError):
    """The S3 server does not answer, or is too busy; worth a retry."""


class StorageRefused(PermissionError):
    """The S3 server rejects the request, as a rule for its credentials or its bucket."""


@dataclass(frozen=True)
class Entry:
    """An object in a listing."""

    name: str
    bytes: int
    etag: str
    """The server's tag for the content: it changes when the content does."""
    modified: datetime


class Store:
    """A bucket, or a prefix in one, written as `s3://BUCKET[/PREFIX]`.

    Every method raises `StorageUnreachable` or `StorageRefused`, with the cure in the message.
    """

    def __init__(self, address: str) -> None:
        if not address.startswith("s3://") or not address[5:].strip("/"):
            raise ValueError(
                f"the store is {address!r}; expected s3://BUCKET or s3://BUCKET/PREFIX"
            )
        self.address = address.rstrip("/")
        self.bucket, _, self._prefix = self.address[5:].partition("/")
        with self._s3_errors():
            self._client = _connect()
        # Closes the connections when the store is garbage-collected: no caller has to close it.
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
        with self._s3_errors():
            self._client.put_object(
                Bucket=self.bucket, Key=self._key(name), Body=content, ContentType=kind
            )
        return self.address_of(name)

    def get(self, name: str) -> bytes:
        """Return the content of an object; FileNotFoundError with its address if there is none."""
        from botocore.exceptions import ClientError

        with self._s3_errors():
            try:
                response = self._client.get_object(Bucket=self.bucket, Key=self._key(name))
            except ClientError as error:
                if error.response["Error"]["Code"] == "NoSuchKey":
                    raise FileNotFoundError(
                        f"{self.address_of(name)} holds nothing; it was removed, or never written"
                    ) from error
                raise
            return response["Body"].read()

    def modified(self, name: str) -> datetime:
        """Return the time at which an object was written."""
        with self._s3_errors():
            return self._client.head_object(Bucket=self.bucket, Key=self._key(name))["LastModified"]

    def has(self, name: str) -> bool:
        """Return True if there is an object called `name`."""
        from botocore.exceptions import ClientError

        with self._s3_errors():
            try:
                self._client.head_object(Bucket=self.bucket, Key=self._key(name))
            except ClientError as error:
                # A response to HEAD has no body, so the code is the status.
                if error.response["Error"]["Code"] == "404":
                    return False
                raise
            return True

    def time(self) -> datetime:
        """Return the time by the server's clock, with which it dates objects."""
        with self._s3_errors():
            response = self._client.head_bucket(Bucket=self.bucket)
        return read_date(response["ResponseMetadata"]["HTTPHeaders"].get("date"))

    def remove(self, name: str) -> None:
        """Remove an object; a missing one is no error."""
        with self._s3_errors():
            self._client.delete_object(Bucket=self.bucket, Key=self._key(name))

    def copy(self, name: str, to: str) -> None:
        """Copy an object within the store, whole or not at all."""
        with self._s3_errors():
            self._client.copy_object(
                Bucket=self.bucket,
                Key=self._key(to),
                CopySource={"Bucket": self.bucket, "Key": self._key(name)},
            )

    def move(self, entry: Entry, name: str) -> bool:
        """Move the object of `entry` to `name`; False if it has changed or is gone.

        It is copied first. An object that was written in its place meanwhile is not removed.
        """
        # A copy that exists already was made by an attempt that died before the removal.
        if not self.has(name):
            if self._present(entry.name) != entry:
                return False
            self.copy(entry.name, name)
        copy = self._present(name)
        if copy is None or copy.bytes != entry.bytes:
            raise StorageRefused(
                f"{self.address_of(name)} is not the copy of {self.address_of(entry.name)} that "
                "was asked for; nothing was removed: look at both"
            )
        # Once more, as late as possible: the copy may have taken a while.
        if self._present(entry.name) != entry:
            return False
        self.remove(entry.name)
        return True

    def names(self, prefix: str) -> list[str]:
        """Return the names of all objects under `prefix`, in order."""
        return [entry.name for entry in self.entries(prefix)]

    def entries(self, prefix: str) -> list[Entry]:
        """Return all objects under `prefix`, in order of their names.

        The empty objects by which consoles mark folders, whose names end with a slash, are left
        out.
        """
        with self._s3_errors():
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=self._key(prefix)
            )
            cut = len(self._key(""))  # names are relative to the store
            found = [
                Entry(each["Key"][cut:], each["Size"], each["ETag"], each["LastModified"])
                for page in pages
                for each in page.get("Contents", [])
                if not each["Key"].endswith("/")
            ]
        return sorted(found, key=lambda entry: entry.name)

    def folders(self, prefix: str) -> list[str]:
        """Return the names of the folders right under `prefix`, which ends with a slash."""
        with self._s3_errors():
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=self._key(prefix), Delimiter="/"
            )
            cut = len(self._key(prefix))
            return [
                found["Prefix"][cut:].rstrip("/")
                for page in pages
                for found in page.get("CommonPrefixes", [])
            ]

    def link(self, name: str) -> str:
        """Return a presigned URL, which any browser can open for `LINK_LIFE`."""
        with self._s3_errors():
            return self._client.generate_presigned_url(
                "get_object",
                Params={"Bucket": self.bucket, "Key": self._key(name)},
                ExpiresIn=int(LINK_LIFE.total_seconds()),
            )

    def check(self) -> None:
        """Write an object, read it back and remove it: all that a run needs, checked before it."""
        content = b"the store can be written and read"
        self.put(keys.CHECK, content)
        if self.get(keys.CHECK) != content:
            address = self.address_of(keys.CHECK)
            raise StorageRefused(f"{address} does not hold what was written to it")
        self.remove(keys.CHECK)

    def _present(self, name: str) -> Entry | None:
        return next((entry for entry in self.entries(name) if entry.name == name), None)

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name

    @contextmanager
    def _s3_errors(self) -> Iterator[None]:
        """Translate boto3's errors into ours, with the server's answer and the cure."""
        from botocore import exceptions as s3
        from botocore.parsers import ResponseParserError

        try:
            yield
        except (s3.NoCredentialsError, s3.PartialCredentialsError) as error:
            raise StorageRefused(
                f"no complete S3 credentials were found ({error}); set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, a profile or an instance role where this run executes"
            ) from error
        except s3.ParamValidationError as error:
            cause = str(error).splitlines()[-1].strip()
            raise StorageRefused(
                f"no request can be made of {self.address} ({cause}); correct "
                "the address of the store, s3://BUCKET or s3://BUCKET/PREFIX"
            ) from error
        except s3.ClientError as error:
            code = error.response["Error"]["Code"]
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            if code in _BUSY or status == HTTPStatus.TOO_MANY_REQUESTS or status >= _SERVER_FAULT:
                raise StorageUnreachable(
                    f"the S3 server of {self.address} is busy: it answered {error.operation_name} "
                    f"with {code}, status {status}; nothing is wrong with the request, try later"
                ) from error
            if code == "NoSuchBucket":
                raise StorageRefused(
                    f"bucket {self.bucket!r} does not exist; create it, or name another store"
                ) from error
            raise StorageRefused(
                f"S3 refused {error.operation_name} on {self.address} ({code}); check that "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY belong to this server and may read "
                "and write this bucket"
            ) from error
        except (
            s3.HTTPClientError,
            s3.EndpointConnectionError,
            s3.IncompleteReadError,
            ResponseParserError,
        ) as error:
            raise StorageUnreachable(
                f"the S3 server of {self.address} does not answer "
                f"({without_credentials(str(error))}); start it (`make up` starts the local one) "
                "or correct AWS_ENDPOINT_URL_S3"
            ) from None  # Prefect would log the cause, which may quote a password


def _connect() -> "S3Client":
    from boto3.session import Session
    from botocore.config import Config
    from botocore.session import get_session

    patience = Config(
        connect_timeout=5,
        read_timeout=60,
        retries={"mode": "standard", "total_max_attempts": 3},
        signature_version="s3v4",  # boto3 still signs links with version 2 by default
    )
    # A session of its own: boto3's default one keeps the first credentials that it finds.
    session = get_session()
    session.register_component("data_loader", _loader())
    return Session(botocore_session=session).client("s3", config=patience)


@cache
def _loader() -> "Loader":
    """Return the shared loader of botocore's descriptions of S3: the slow part of a new client."""
    from botocore.loaders import create_loader

    return create_loader()
