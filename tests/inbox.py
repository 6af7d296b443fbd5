"""A real HTTP server that receives messages: its path says if it takes, refuses, hangs, is slow."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "xoxb-4242-VeryS3cretT0ken"  # noqa: S105 - it is planted, to be looked for everywhere
_SHORT = 600
_SLOW_SECONDS = 11


class Inbox(ThreadingHTTPServer):
    """Messages as they arrive at `/take/TOKEN`.

    `/refuse/…` answers 500, `/hang/…` never; `/short/…` takes no more than 600 bytes; `/slow/…` has
    taken the message long before it answers.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.received: list[dict[str, Any]] = []
        self.times: list[float] = []
        """When each was received, seconds since the epoch."""
        self.paths: list[str] = []

    def address(self, answer: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{answer}/{TOKEN}?key={TOKEN}&x=a%20b"

    def subjects(self) -> list[str]:
        return [message["subject"] for message in self.received]

    def failures(self, run: str) -> list[dict[str, Any]]:
        """Return the messages that call a flow run failed."""
        return [m for m in self.received if m.get("run") == run and m["type"] == "failure"]

    def find(self, subject: str, seconds: float) -> dict[str, Any]:
        """Wait for the message of that subject; others may come before it."""
        deadline = time.monotonic() + seconds
        while subject not in self.subjects():
            assert time.monotonic() < deadline, f"received only {self.subjects()}"
            time.sleep(0.2)
        return self.received[self.subjects().index(subject)]

    def wait_for(self, messages: int, seconds: float) -> list[str]:
        deadline = time.monotonic() + seconds
        while len(self.received) < messages:
            assert time.monotonic() < deadline, f"received only {self.subjects()}"
            time.sleep(0.2)
        return self.subjects()


class _Handler(BaseHTTPRequestHandler):
    server: Inbox

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.paths.append(self.path)
        if self.path.startswith("/hang/"):
            time.sleep(60)
        long = self.path.startswith("/short/") and len(content) > _SHORT
        takes = self.path.startswith(("/take/", "/slow/", "/short/")) and not long
        if takes:
            self.server.times.append(time.time())
            self.server.received.append(json.loads(content))
        if self.path.startswith("/slow/"):
            time.sleep(_SLOW_SECONDS)
        self.send_response(200 if takes else 413 if long else 500)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing: a path is a secret."""


@contextmanager
def open_inbox() -> Iterator[Inbox]:
    with Inbox() as inbox:
        threading.Thread(target=inbox.serve_forever, daemon=True).start()
        yield inbox
        inbox.shutdown()
