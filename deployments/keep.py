"""Keep the local stack alive: start again what died of its servers and its worker.

`make up` starts this program last and `make down` ends it first. The log of what died is kept as
`.previous.log`. The pauses between attempts grow, so that what cannot start is no busy loop.
"""

import logging
import sys
import time
from dataclasses import dataclass

from deployments import processes
from deployments.services import HOST, Service, Stack
from deployments.stack import all_services, launch, running

_LOGGER = logging.getLogger("keeper")

LOOK_SECONDS = 3.0
PAUSES = (0.0, 2.0, 5.0, 15.0, 30.0, 60.0)  # seconds before each attempt; the last one from then on
SETTLED = 120.0  # seconds of life after which earlier deaths no longer count


@dataclass
class Attempts:
    """How often a service was started again, and when for the last time."""

    number: int = 0
    last: float = 0.0

    def is_due(self, now: float) -> bool:
        """Tell whether the pause is over; a service that lived for long begins anew."""
        if now - self.last > SETTLED:
            self.number = 0
        return now - self.last >= PAUSES[min(self.number, len(PAUSES) - 1)]

    def note(self, now: float) -> None:
        """Count an attempt."""
        self.number += 1
        self.last = now


def main() -> int:
    """Look after the stack until this program is ended."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s | %(levelname)-7s | %(name)s - %(message)s"
    )
    stack = Stack.configured()
    attempts = {service.name: Attempts() for service in all_services(stack)}
    while True:
        time.sleep(LOOK_SECONDS)
        try:
            look(stack, attempts)
        except OSError:  # a full disk, no process to be had: better at the next look
            _LOGGER.exception("what has ended could not be started again")


def look(stack: Stack, attempts: dict[str, Attempts]) -> None:
    """Start again each service that is missing and whose pause is over."""
    processes.reap()
    *kept, _keeper = all_services(stack)
    found = processes.find(stack.root)  # once: it reads the variables of every process
    for service in kept:
        mine = attempts[service.name]
        there = any(processes.runs(process, service.command) for process in found)
        if not there and mine.is_due(time.monotonic()):
            with processes.one_at_a_time(stack.root, _LOGGER.info):  # not while `make down` ends it
                if running(stack, service) is None:
                    mine.note(time.monotonic())
                    revive(stack, service)


def revive(stack: Stack, service: Service) -> None:
    """End what a dead service has left over, and start it again; flow runs go on."""
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
