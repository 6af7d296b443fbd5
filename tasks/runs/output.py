"""Standard output that outlives its reader.

A flow's process writes to a pipe that its worker reads. Once the worker has died, the next line
raises BrokenPipeError, and where Prefect's console handler wrote it, rich ends the thread: every
death of a worker would cost each of its runs an attempt. The log reaches the server another way.
"""

import logging
import sys
from contextlib import suppress
from typing import Any


class _Patient:
    """A text stream whose writes are lost once nobody reads them."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(BrokenPipeError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(BrokenPipeError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def outlive_the_reader() -> None:
    """Let standard output, standard error and the log handlers that write to them lose lines."""
    if isinstance(sys.stdout, _Patient):
        return
    streams = {sys.stdout: _Patient(sys.stdout), sys.stderr: _Patient(sys.stderr)}
    sys.stdout, sys.stderr = streams.values()
    loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict]
    for handler in {handler for logger in [logging.root, *loggers] for handler in logger.handlers}:
        if isinstance(handler, logging.StreamHandler) and handler.stream in streams:
            handler.setStream(streams[handler.stream])
            if console := getattr(handler, "console", None):  # Prefect's own, which rich writes
                console.file = handler.stream
