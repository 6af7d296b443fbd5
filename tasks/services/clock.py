"""The time by the clock of a server, which all runs share: that of one machine may be a day off."""

from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient


def server_time(prefect: "SyncPrefectClient") -> datetime:
    """Return the time by the clock of Prefect's server, by which it dates runs and their states."""
    return read_date(prefect.request("GET", "/health").headers.get("date"))


def read_date(header: str | None) -> datetime:
    """Return the end of the second that a server's `Date` header names; our own time without one.

    The end, so that nothing which the server has dated lies in the future.
    """
    try:
        told = parsedate_to_datetime(header or "")
    except ValueError:
        return datetime.now(UTC)
    aware = told if told.tzinfo else told.replace(tzinfo=UTC)  # -0000 is UTC without a place
    return aware + timedelta(seconds=1)
