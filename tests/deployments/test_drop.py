"""A batch that cannot be dropped is a sentence."""

from contextlib import nullcontext
from pathlib import Path

import pytest

from deployments.drop import main


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Return a command line that `main` reads; nothing listens behind it."""
    file = tmp_path / "part.parquet"
    file.write_bytes(b"PAR1")
    words = ["drop", "--batch=a", str(file)]
    monkeypatch.setattr("sys.argv", words)
    monkeypatch.setattr("deployments.drop.connect_to_prefect", nullcontext)
    return words


@pytest.mark.parametrize("dataset", ["UPPER", "-x", "a_b", "", "a" * 64])
def test_what_a_data_set_is_called_is_said(
    command: list[str], capsys: pytest.CaptureFixture[str], dataset: str
) -> None:
    command.insert(1, f"--dataset={dataset}")
    assert main() == 1
    error = capsys.readouterr().err
    assert f"{dataset!r} is no name of a data set; expected at most 63 small letters" in error


@pytest.mark.parametrize("store", ["mybucket", "s3://my bucket"])
def test_a_store_that_is_no_address_is_a_sentence(
    command: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    store: str,
) -> None:
    monkeypatch.setenv("RETRAINING_STORE", store)
    assert main() == 1
    assert "s3://BUCKET or s3://BUCKET/PREFIX" in capsys.readouterr().err


def test_an_interrupted_command_has_no_traceback(
    command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("deployments.drop.connect_to_prefect", interrupt)
    assert main() == 130
