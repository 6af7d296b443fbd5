"""The proxy misbehaves as it is told to, and passes everything else unchanged."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from deployments.stack import Ports
from tests.faults.proxy import Kind, Mode, Proxy

LONG = b"x" * 5000


class Echo(BaseHTTPRequestHandler):
    """Answers with what was posted and the Host that was named."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("X-Host", self.headers["Host"])
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def port() -> Iterator[int]:
    """Return the port of a server that echoes."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def proxy(port: int) -> Iterator[Proxy]:
    proxy = Proxy("s3", Ports.free().s3, port)
    yield proxy
    proxy.close()


@pytest.fixture
def client(proxy: Proxy) -> Iterator[httpx.Client]:
    address = f"http://127.0.0.1:{proxy._port}"
    with httpx.Client(base_url=address, trust_env=False, timeout=3) as client:
        yield client


def test_what_is_sent_arrives_with_the_same_host(proxy: Proxy, client: httpx.Client) -> None:
    answer = client.post("/a", content=LONG)
    assert answer.content == LONG
    assert answer.headers["X-Host"] == f"127.0.0.1:{proxy._port}"


def test_a_service_that_is_away_refuses_connections(proxy: Proxy, client: httpx.Client) -> None:
    client.post("/a", content=LONG)
    proxy.switch("away")
    with pytest.raises(httpx.ConnectError):
        client.post("/a", content=LONG)
    proxy.switch("pass")
    assert client.post("/a", content=LONG).status_code == 200


def test_a_service_that_hangs_answers_nothing(proxy: Proxy, client: httpx.Client) -> None:
    proxy.switch("hanging")
    with pytest.raises(httpx.ReadTimeout):
        client.post("/a", content=LONG, timeout=0.5)


@pytest.mark.parametrize(
    ("kind", "mode", "status", "word"),
    [
        ("s3", "refusing", 403, "AccessDenied"),
        ("s3", "busy", 503, "SlowDown"),
        ("mlflow", "refusing", 401, "authenticated"),
        ("prefect", "busy", 503, "Unavailable"),
        ("mlflow", "nonsense", 200, "Sign in"),
    ],
)
def test_an_answer_is_what_the_service_would_say(
    port: int, kind: Kind, mode: Mode, status: int, word: str
) -> None:
    proxy = Proxy(kind, Ports.free().s3, port)
    try:
        proxy.switch(mode)
        address = f"http://127.0.0.1:{proxy._port}/a"
        for content in (LONG, iter([LONG, LONG])):  # with a length, and in chunks
            answer = httpx.post(address, content=content, trust_env=False)
            assert answer.status_code == status
            assert word in answer.text
    finally:
        proxy.close()


def test_a_truncated_answer_is_cut_short(proxy: Proxy, client: httpx.Client) -> None:
    proxy.switch("truncated")
    with pytest.raises(httpx.RemoteProtocolError):
        client.post("/a", content=LONG)


def test_a_slow_service_answers_all_the_same(proxy: Proxy, client: httpx.Client) -> None:
    proxy.switch("slow")
    answer = client.post("/a", content=LONG)
    assert answer.content == LONG
    assert answer.elapsed.total_seconds() > 0.4
