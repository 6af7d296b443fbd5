"""Standard output that outlives its reader.

A flow's process writes to a pipe that its worker reads. Once the worker has died, the next line
raises BrokenPipeError, and if Prefect's console handler wrote it, rich ends the thread: every death
of a worker would cost each of its runs an attempt. The log still reaches the server through its
API.
"""

import logging
import sys
from contextlib import suppress
from typing import Any


class _LossyStream:
    """A text stream that drops its writes once nobody reads them."""

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
    """Make standard output, standard error and their log handlers drop lines without a reader."""
    if isinstance(sys.stdout, _LossyStream):
        return
    streams = {sys.stdout: _LossyStream(sys.stdout), sys.stderr: _LossyStream(sys.stderr)}
    sys.stdout, sys.stderr = streams.values()
    # A handler keeps the stream that it was made with, so each one is moved to the new stream.
    loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict]
    for handler in {handler for logger in [logging.root, *loggers] for handler in logger.handlers}:
        if isinstance(handler, logging.StreamHandler) and handler.stream in streams:
            handler.setStream(streams[handler.stream])
            # Prefect's handler prints through rich, whose console keeps a stream of its own.
            if console := getattr(handler, "console", None):
                console.file = handler.stream
