"""A lock across runs, on Prefect's global concurrency limits.

It serialises changes to shared state, such as a model's aliases or a data set's ledger.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import (
    GlobalConcurrencyLimitCreate,
    GlobalConcurrencyLimitUpdate,
)
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

_LEASE_SECONDS = 60  # the least that Prefect allows; a promotion takes one or two
_PATIENCE_SECONDS = 600


class Busy(ConnectionError):
    """Other runs held the lock for too long.

    A `ConnectionError`, so that a task retries it: see tasks/services/step.py.
    """


@contextmanager
def exclusive(name: str, verb: str = "promote") -> Iterator[None]:
    """Hold the lock `verb`-`name` for the block, on all machines of this Prefect server.

    A holder that dies blocks the others for its lease of a minute, no longer. Raises `Busy` if the
    lock is not free within ten minutes.
    """
    limit = f"{verb}-{name}"
    with get_client(sync_client=True) as prefect:
        try:
            found = prefect.read_global_concurrency_limit_by_name(limit)
            # Somebody edited it. It is not written otherwise, so that no write meets a holder's.
            if found.limit != 1 or not found.active:
                bound = GlobalConcurrencyLimitUpdate(limit=1, active=True)
                prefect.update_global_concurrency_limit(limit, bound)
        except ObjectNotFound:
            with suppress(ObjectAlreadyExists):  # another run was faster
                wanted = GlobalConcurrencyLimitCreate(name=limit, limit=1)
                prefect.create_global_concurrency_limit(wanted)
    # Only the acquisition turns a TimeoutError into `Busy`; one of the block passes unchanged.
    with ExitStack() as held:
        try:
            held.enter_context(
                concurrency(
                    limit,
                    timeout_seconds=_PATIENCE_SECONDS,
                    lease_duration=_LEASE_SECONDS,
                    strict=True,  # an absent limit is an error, not an open door
                )
            )
        except TimeoutError as error:
            raise Busy(
                f"other runs held the concurrency limit {limit} for {_PATIENCE_SECONDS} s; nothing "
                "was changed: look for a run that hangs, cancel it, and run again"
            ) from error
        yield
