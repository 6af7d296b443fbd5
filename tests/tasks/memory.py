"""For tests without a server: boto3's own client, over objects in memory."""

import hashlib
import io
from datetime import UTC, datetime
from email.utils import formatdate
from typing import Any

import pytest
from botocore.exceptions import ClientError

from tasks.services import s3


class MemoryS3:
    """The objects of all buckets, and the requests that were made for them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.objects = dict[str, bytes]()
        self.requests = list[str]()
        """Operation and key of each."""
        connect = s3._connect

        def connect_to_memory() -> Any:
            client = connect()
            monkeypatch.setattr(client, "_make_api_call", self._answer)
            return client

        monkeypatch.setattr(s3, "_connect", connect_to_memory)

    def _answer(self, operation: str, given: dict[str, Any]) -> dict[str, Any]:
        key = given.get("Key", given.get("Prefix", ""))
        self.requests.append(f"{operation} {key}")
        if operation in {"GetObject", "HeadObject"} and key not in self.objects:
            code = "NoSuchKey" if operation == "GetObject" else "404"
            raise ClientError({"Error": {"Code": code}}, operation)
        match operation:
            case "PutObject":
                self.objects[key] = given["Body"]
            case "CopyObject":
                self.objects[key] = self.objects[given["CopySource"]["Key"]]
            case "DeleteObject":
                self.objects.pop(key, None)
            case "GetObject":
                return {"Body": io.BytesIO(self.objects[key])}
            case "HeadBucket":
                return {"ResponseMetadata": {"HTTPHeaders": {"date": formatdate(usegmt=True)}}}
            case "ListObjectsV2":
                return self._list(key, given.get("Delimiter"))
        return {}

    def _list(self, prefix: str, delimiter: str | None) -> dict[str, Any]:
        found = sorted(key for key in self.objects if key.startswith(prefix))
        cuts = {key: key.find(delimiter, len(prefix)) if delimiter else -1 for key in found}
        folders = sorted({key[: cut + 1] for key, cut in cuts.items() if cut >= 0})
        return {
            "CommonPrefixes": [{"Prefix": folder} for folder in folders],
            "Contents": [
                {
                    "Key": key,
                    "Size": len(self.objects[key]),
                    "ETag": hashlib.sha256(self.objects[key]).hexdigest(),
                    "LastModified": datetime(2026, 11, 2, tzinfo=UTC),
                }
                for key in found
                if cuts[key] < 0
            ],
        }
