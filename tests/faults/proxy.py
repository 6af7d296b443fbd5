"""A proxy in front of one service, which can be switched to misbehave while everything runs.

It copies bytes, so that signatures of S3 and websockets of Prefect pass unchanged. Switching cuts
the connections that are open, as a load balancer does when its target changes.
"""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Literal

Mode = Literal["pass", "away", "hanging", "slow", "refusing", "busy", "nonsense", "truncated"]
Kind = Literal["s3", "mlflow", "prefect"]

HOST = "127.0.0.1"
SLOW_SECONDS = 0.4
"""Delay of every piece of an answer that a slow service sends."""

_PIECE = 1 << 16
_LINGER_SECONDS = 5.0
_TRUNCATED_BYTES = 300
_LOGIN_PAGE = (
    b"<!doctype html><html><body><h1>Sign in</h1><form action=/login></form></body></html>"
)
_S3_ERROR = (
    '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>planted by the table '
    "of faults</Message><RequestId>0</RequestId></Error>"
)
_REFUSALS: dict[Kind, tuple[int, str, str]] = {
    "s3": (403, "application/xml", _S3_ERROR.format(code="AccessDenied")),
    "mlflow": (401, "text/plain", "You are not authenticated."),
    "prefect": (401, "application/json", '{"exception_message": "Unauthorized"}'),
}
_BUSY: dict[Kind, tuple[int, str, str]] = {
    "s3": (503, "application/xml", _S3_ERROR.format(code="SlowDown")),
    "mlflow": (503, "text/plain", "upstream connect error"),
    "prefect": (503, "application/json", '{"detail": "Service Unavailable"}'),
}

_Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Proxy:
    """One service behind a port of its own; `switch` changes how it behaves.

    The sockets live in a thread of the proxy's own, so that it may be used from anywhere.
    """

    def __init__(self, kind: Kind, port: int, target: int) -> None:
        self.mode: Mode = "pass"
        self._kind, self._port, self._target = kind, port, target
        self._loop = asyncio.new_event_loop()
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"proxy of {kind}")
        self._thread.start()
        self._do(self._listen())

    def switch(self, mode: Mode) -> None:
        """Behave in this way from now on; returns once that is so."""
        self._do(self._switch(mode))

    def close(self) -> None:
        """Stop listening and cut every connection."""
        self._do(self._switch("away"))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, work: Awaitable[None]) -> None:
        async def done() -> None:
            await work

        asyncio.run_coroutine_threadsafe(done(), self._loop).result(timeout=30)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._accept, HOST, self._port)

    async def _switch(self, mode: Mode) -> None:
        self.mode = mode
        if self._server:
            self._server.close()  # nobody gets in between
        for connection in tuple(self._open):
            connection.cancel()
        if self._open:
            await asyncio.wait(tuple(self._open))
        if self._server:
            await self._server.wait_closed()
            self._server = None
        if mode != "away":
            await self._listen()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.current_task()
        assert connection
        self._open.add(connection)
        try:
            await self._behaviour()(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # a connection that ends, or is cut, is what this is for
        finally:
            self._open.discard(connection)
            writer.transport.abort()

    def _behaviour(self) -> _Handler:
        if self.mode == "hanging":
            return self._hang
        if self.mode in ("refusing", "busy", "nonsense"):
            return self._answer
        return self._pass

    async def _hang(self, reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        while await reader.read(_PIECE):
            pass

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request with what the service would say in this mode."""
        if self.mode == "nonsense":
            status, kind, body = 200, "text/html", _LOGIN_PAGE
        else:
            status, kind, text = (_BUSY if self.mode == "busy" else _REFUSALS)[self._kind]
            body = text.encode()
        head = await reader.readuntil(b"\r\n\r\n")
        await _skip_body(head, reader)
        lines = [
            f"HTTP/1.1 {status} Planted",
            f"Content-Type: {kind}",
            f"Content-Length: {len(body)}",
            "Connection: close",
        ]
        content = b"" if head.startswith(b"HEAD ") else body
        writer.write("\r\n".join([*lines, "", ""]).encode() + content)
        await writer.drain()
        writer.write_eof()
        await reader.read(_PIECE)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            answers, requests = await asyncio.open_connection(HOST, self._target)
        except OSError:  # the service itself is away, which looks like this through a balancer, too
            return
        pumps = [
            asyncio.ensure_future(_pump(reader, requests)),
            asyncio.ensure_future(self._pump_answers(answers, writer)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait(pumps, timeout=_LINGER_SECONDS)  # what is on its way may arrive
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            requests.transport.abort()

    async def _pump_answers(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        while piece := await reader.read(_PIECE):
            if self.mode == "slow":
                await asyncio.sleep(SLOW_SECONDS)
            if self.mode == "truncated":
                writer.write(piece[: min(_TRUNCATED_BYTES, len(piece) - 1)])
                await writer.drain()
                break
            writer.write(piece)
            await writer.drain()
        writer.write_eof()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while piece := await reader.read(_PIECE):
        writer.write(piece)
        await writer.drain()
    writer.write_eof()


async def _skip_body(head: bytes, reader: asyncio.StreamReader) -> None:
    """Read the body of a request to its end: an answer before that would be lost in a reset."""
    fields = {
        name.strip().lower(): value.strip()
        for name, _, value in (line.partition(b":") for line in head.split(b"\r\n")[1:])
    }
    if b"expect" in fields:  # the client waits for our word, and so sends none
        return
    if fields.get(b"transfer-encoding", b"").lower() == b"chunked":
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            await reader.readexactly(size + 2)
        await reader.readuntil(b"\r\n")
    elif length := int(fields.get(b"content-length", b"0")):
        await reader.readexactly(length)
