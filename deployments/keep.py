"""The keeper: restarts the servers and the worker of the local stack when they die.

`make up` starts this program last and `make down` ends it first. The log of a dead service is kept
as `.previous.log`. The pauses between attempts grow, so that a service that cannot start does not
become a busy loop.

A worker whose memory has grown is ended between two runs and restarted: Prefect's worker (3.9.1)
keeps half a MiB or more of each run, though no Python object does, and a watch runs every five
minutes.
"""

import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

import psutil

from deployments import processes
from deployments.services import HOST, Service, Stack, worker
from deployments.stack import all_services, launch, running

_LOGGER = logging.getLogger("keeper")

LOOK_SECONDS = 3.0  # between two checks
PAUSES = (0.0, 2.0, 5.0, 15.0, 30.0, 60.0)  # seconds before each attempt; the last one repeats
SETTLED = 120.0  # seconds since the last attempt after which the pauses start over
GROWN = 250 * 2**20  # bytes of a worker's memory; it begins with 100 MiB
YOUNG = 3600.0  # seconds of life within which a worker's memory is not taken for growth


@dataclass
class Attempts:
    """Number of restarts of a service, and the time of the last one, in monotonic seconds."""

    number: int = 0
    last: float = 0.0

    def is_due(self, now: float) -> bool:
        """Return True if the pause is over; after `SETTLED` seconds the count starts over."""
        if now - self.last > SETTLED:
            self.number = 0
        return now - self.last >= PAUSES[min(self.number, len(PAUSES) - 1)]

    def note(self, now: float) -> None:
        """Count an attempt."""
        self.number += 1
        self.last = now


def main() -> int:
    """Check the stack every `LOOK_SECONDS` until this program is ended."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s | %(levelname)-7s | %(name)s - %(message)s"
    )
    stack = Stack.configured()
    attempts = {service.name: Attempts() for service in all_services(stack)}
    while True:
        time.sleep(LOOK_SECONDS)
        try:
            look(stack, attempts)
        # Such as a full disk, or a package that is being installed. The keeper must outlive it, and
        # the next check may succeed.
        except Exception:
            _LOGGER.exception("what has ended could not be started again")


def look(stack: Stack, attempts: dict[str, Attempts]) -> None:
    """Restart each service that is missing and whose pause is over; end a grown worker."""
    processes.reap()  # a dead child is a zombie until then, and still in the process table
    *kept, _keeper = all_services(stack)
    found = processes.find(stack.root)  # once: it reads the variables of every process
    for service in kept:
        mine = attempts[service.name]
        alive = any(processes.runs(process, service.command) for process in found)
        if not alive and mine.is_due(time.monotonic()):
            with processes.one_at_a_time(stack.root, _LOGGER.info):  # not while `make down` ends it
                # Checked again under the lock: `make up` may have started the service meanwhile.
                if running(stack, service) is None:
                    mine.note(time.monotonic())
                    revive(stack, service)
    if find_grown(worker(stack), found):
        with processes.one_at_a_time(stack.root, _LOGGER.info):
            # Again, because `make up` may have held the lock for long, and a run may have begun.
            if grown := find_grown(worker(stack), processes.find(stack.root)):
                most = GROWN // 2**20
                _LOGGER.warning("the worker has more than %d MiB; it is ended, to begin anew", most)
                processes.end([grown])  # the next check finds it missing and restarts it


def find_grown(
    service: Service,
    found: Mapping[psutil.Process, str],
    most: int = GROWN,
    young: float = YOUNG,
) -> psutil.Process | None:
    """Return a worker with more than `most` bytes of memory, unless `found` has a flow run of it.

    A worker younger than `young` seconds is never returned. On SIGTERM a worker hands back the run
    that it has picked up meanwhile.
    """
    # Flow runs inherit the worker's service name: more than one process means that one is running.
    theirs = [process for process, name in found.items() if name == service.name]
    if len(theirs) != 1 or not processes.runs(theirs[0], service.command):
        return None
    try:
        old = time.time() - theirs[0].create_time() > young
        return theirs[0] if old and theirs[0].memory_info().rss > most else None
    except psutil.NoSuchProcess:
        return None


def revive(stack: Stack, service: Service) -> None:
    """End the leftover processes of a dead service and restart it; flow runs go on."""
    # Only servers have a port. The worker has none, and its leftovers are the flow runs.
    if service.port is not None:
        processes.end(p for p, name in processes.find(stack.root).items() if name == service.name)
        holder = processes.port_holder(HOST, service.port[1])
        if holder is not None:
            port = service.port[1]
            _LOGGER.warning("%s has ended; its port %d is held by %s", service.name, port, holder)
            return
    process = launch(stack, service)
    _LOGGER.warning("%s had ended and is started again, pid %d", service.name, process.pid)


if __name__ == "__main__":
    sys.exit(main())
