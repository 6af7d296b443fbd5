"""A real HTTP server that keeps the messages which people would get."""

import json
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Message:
    """What came, and when, in seconds since the epoch."""

    when: float
    fields: dict[str, str]

    def is_about(self, run: str) -> bool:
        """Tell whether it is about a flow run."""
        return self.fields.get("run") == run


class Inbox:
    """Listen on a free port of the loopback until closed."""

    def __init__(self) -> None:
        messages = self.messages = list[Message]()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                content = json.loads(self.rfile.read(length))
                fields = {str(name): str(value) for name, value in content.items()}
                messages.append(Message(time.time(), fields))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_arguments: object) -> None:
                """Keep the terminal for the table."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, name="inbox")
        self._thread.start()

    @property
    def address(self) -> str:
        """Where it listens, as `make notify URL=…` takes it."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/hook"

    def failures(self, run: str) -> list[Message]:
        """Return the messages that call a run failed."""
        return [m for m in self.messages if m.is_about(run) and m.fields["type"] == "failure"]

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
