"""Tags of a registered version: its origin, and how it was judged."""

from collections.abc import Mapping
from typing import Self

from pydantic import BaseModel, Field, ValidationError

NO_CHAMPION = "no champion"
"""What a candidate was compared with where there was no champion."""


class VersionTags(BaseModel, frozen=True, validate_by_name=True, validate_by_alias=True):
    """Tags of a version that was judged.

    The fields without a default are what every later step needs; a release may add others.
    """

    snapshot: str
    """Digest of the snapshot that it was trained on."""
    verdict: str
    reason: str = "no reason given"
    compared_with: str
    """Address of the champion of that time, or `NO_CHAMPION`."""
    accuracy: float
    """Share of the test split that it has right."""
    outcomes: str | None = None
    """Address of its predictions."""
    artifact_sha256: str
    """Digest of its files."""
    git_commit: str | None = None
    flow_run_id: str | None = Field(None, alias="prefect.flow_run_id")
    flow_run_url: str | None = Field(None, alias="prefect.flow_run_url")
    parameters: str | None = None
    """Parameters of its flow run, as JSON."""
    fingerprint: str | None = None
    """JSON of a `Fingerprint`."""
    decision_record: str | None = None
    """Address of the decision. The last tag to be written: where it is, all others are."""

    @classmethod
    def from_mlflow(cls, tags: Mapping[str, str]) -> Self | None:
        """Return the tags of a version; None if it was never judged, or is half registered."""
        try:
            return cls.model_validate(dict(tags))
        except ValidationError:
            return None

    def to_mlflow(self) -> dict[str, str]:
        """Return the tags as MLflow stores them, in the order in which they are written."""
        values = self.model_dump(by_alias=True, exclude_none=True)
        return {key: str(value) for key, value in values.items()}


def missing_tags(tags: Mapping[str, str]) -> list[str]:
    """Return the names of the needed tags that are missing, or hold no such value."""
    try:
        VersionTags.model_validate(dict(tags))
    except ValidationError as error:
        return [str(each["loc"][0]) for each in error.errors()]
    return []
