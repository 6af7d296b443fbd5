"""For the scripts of the tests that kill: one forked process for each of several places."""

import os
import signal
from collections.abc import Callable, Iterator

from tasks.services.s3 import DEFAULT_STORE, Store


def kill_before_each_write(
    places: list[str], writes: list[tuple[type, str]], work: Callable[[str], object]
) -> Iterator[tuple[str, int]]:
    """Do the work at the n-th place up to its n-th write, from 0; yield place and exit code.

    `writes` are the methods that count, by their class. A process that has no n-th write ends with
    0, one that was killed in front of it with -9.
    """
    Store(DEFAULT_STORE)  # loads boto3, which each child would do for itself
    for number, place in enumerate(places):
        child = os.fork()
        if child == 0:
            left = [None] * number
            for owner, method in writes:
                setattr(owner, method, _dying(getattr(owner, method), left))
            work(place)
            os._exit(0)
        yield place, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _dying(write: Callable[..., object], left: list[None]) -> Callable[..., object]:
    def write_and_die(*arguments: object, **options: object) -> object:
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        left.pop()
        return write(*arguments, **options)

    return write_and_die
