"""The base of all records: values that are stored for longer than a run, and must load for ever."""

from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationInfo, model_validator

Format = Annotated[int | None, Field(strict=True, exclude_if=lambda number: number is None)]


class Record(BaseModel, frozen=True):
    """A value that is stored with the number of its format, by default the newest.

    A record that is read without a number is older than numbers. It keeps none, so that it is
    written again byte for byte: digests are computed from what is written. Raises ValueError for a
    number above the default.
    """

    format: Format = 1

    @model_validator(mode="before")
    @classmethod
    def _check_format(cls, content: Any, info: ValidationInfo) -> Any:
        if not isinstance(content, dict):
            return content
        newest = cls.model_fields["format"].default or 0
        found = content.get("format")
        if isinstance(found, int) and found > newest:
            raise ValueError(
                f"written by a newer release (format {found}; this one reads {newest}); upgrade "
                "this installation"
            )
        # Only what is made here has the default; what is read has what was written.
        return {"format": None, **content} if info.mode == "json" else content
