"""Time by the clock of a server, which all runs share: that of one machine may be a day off."""

from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient


def server_time(prefect: "SyncPrefectClient") -> datetime:
    """Return the time by the clock of Prefect's server, with which it dates runs and states."""
    return read_date(prefect.request("GET", "/health").headers.get("date"))


def read_date(header: str | None) -> datetime:
    """Return the end of the second in a server's `Date` header; the local time without a valid one.

    The end, so that nothing that the server has dated lies in the future.
    """
    try:
        date = parsedate_to_datetime(header or "")
    except ValueError:
        return datetime.now(UTC)
    aware = date if date.tzinfo else date.replace(tzinfo=UTC)  # -0000 means UTC, parsed as naive
    return aware + timedelta(seconds=1)
