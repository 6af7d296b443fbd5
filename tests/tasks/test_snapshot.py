import logging
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from prefect.logging import disable_run_logger

from mnist_cnn.sample import embedded_sample
from tasks.datasets.mirror import MirrorUnreachable, fetch_mnist
from tasks.datasets.snapshots import read_split
from tasks.services.s3 import Store
from tasks.snapshot import take_snapshot


def test_mnist_comes_whole_from_its_mirror(
    mnist_mirror: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MNIST_MIRROR", mnist_mirror.as_uri())
    train, test = fetch_mnist()
    assert (len(train), len(test)) == (60_000, 10_000)
    assert train.labels[:5].tolist() == [5, 0, 4, 1, 9]


@pytest.mark.parametrize("damage", [lambda raw: raw[:-1000], lambda raw: b"\0" + raw[1:]])
def test_a_damaged_archive_is_refused_with_its_address(
    mnist_mirror: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[bytes], bytes]
) -> None:
    archive = mnist_mirror / "t10k-images-idx3-ubyte.gz"
    archive.write_bytes(damage(archive.read_bytes()))
    monkeypatch.setenv("MNIST_MIRROR", mnist_mirror.as_uri())
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte\.gz is not MNIST's archive"):
        fetch_mnist()


def test_a_mirror_that_does_not_answer_is_named_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MNIST_MIRROR", "http://127.0.0.1:1/mnist")
    with pytest.raises(MirrorUnreachable, match=r"127\.0\.0\.1:1/mnist/.*set MNIST_MIRROR"):
        fetch_mnist()


def test_a_mirror_address_of_another_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MNIST_MIRROR", "/data/mnist")
    with pytest.raises(ValueError, match="MNIST_MIRROR is '/data/mnist'; expected an http://"):
        fetch_mnist()


@pytest.mark.parametrize("user", ["bob:S3CRET", "bob:S3/CRET", "S3CRET"])
def test_a_password_of_a_mirror_is_shown_nowhere(
    monkeypatch: pytest.MonkeyPatch, user: str
) -> None:
    monkeypatch.setenv("MNIST_MIRROR", f"http://{user}@127.0.0.1:1/mnist")
    with pytest.raises(
        MirrorUnreachable, match=r"\(http://127\.0\.0\.1:1/mnist/: .*refused"
    ) as gone:
        fetch_mnist()
    for scheme in ("ftp://", ""):
        monkeypatch.setenv("MNIST_MIRROR", f"{scheme}{user}@example.org/mnist")
        with pytest.raises(ValueError, match=f"is '{scheme}example.org/mnist'; expected") as odd:
            fetch_mnist()
        assert "CRET" not in f"{gone.value} {odd.value}"


def test_a_mirror_gets_its_user_and_password(monkeypatch: pytest.MonkeyPatch) -> None:
    got = list[str | None]()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            got.append(self.headers["Authorization"])
            self.send_error(404)

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("MNIST_MIRROR", f"http://bob:a%2Fb@127.0.0.1:{server.server_port}/")
        with pytest.raises(MirrorUnreachable, match="404"):
            fetch_mnist()
        server.shutdown()
    assert got == ["Basic Ym9iOmEvYg=="]  # bob:a/b


def test_auto_without_mnist_takes_the_sample_and_says_so_loudly(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MNIST_MIRROR", "http://127.0.0.1:1/mnist")
    monkeypatch.setattr("tasks.snapshot.get_run_logger", lambda: logging.getLogger("test"))
    snapshot = take_snapshot.fn("auto", store.address)
    assert snapshot.model_name == "digits-cnn"
    assert "MNIST COULD NOT BE HAD" in caplog.text
    assert read_split(snapshot, "test").digest() == embedded_sample()[1].digest()


def test_mnist_that_cannot_be_had_is_never_replaced(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MNIST_MIRROR", "http://127.0.0.1:1/mnist")
    with disable_run_logger(), pytest.raises(MirrorUnreachable):
        take_snapshot.fn("mnist", store.address)
    assert store.names("") == []
