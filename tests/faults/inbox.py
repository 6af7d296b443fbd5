"""A real HTTP server that keeps the messages which people would get."""

import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Message:
    """What came, and when, in seconds since the epoch."""

    when: float
    body: str


class Inbox:
    """Listen on a free port of the loopback until closed."""

    def __init__(self) -> None:
        messages = self.messages = list[Message]()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                body = self.rfile.read(length).decode(errors="replace")
                messages.append(Message(time.time(), body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_arguments: object) -> None:
                """Keep the terminal for the table."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, name="inbox")
        self._thread.start()

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._server.server_address[1]

    def about(self, word: str) -> list[Message]:
        """Return the messages that hold a word, such as the id of a run."""
        return [message for message in self.messages if word in message.body]

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
