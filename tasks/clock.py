"""The time by the clock of Prefect's server, which all runs share: a machine's may be a day off."""

import time
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient


class ServerClock:
    """Asks the server once, to the second, and counts from there."""

    def __init__(self, prefect: "SyncPrefectClient") -> None:
        told = prefect.request("GET", "/health").headers.get("date")
        self._asked = time.monotonic()
        self._then = parsedate_to_datetime(told) if told else datetime.now(UTC)

    def now(self) -> datetime:
        """Return the time; a machine whose clock is set meanwhile changes nothing."""
        return self._then + timedelta(seconds=time.monotonic() - self._asked)
