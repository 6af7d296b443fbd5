import hashlib
import json
import pickle
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from mnist_cnn.training import CheckpointRefused, LocalCheckpoints
from mnist_cnn.training.checkpoint import Checkpoint, Writer, decode, newest_valid

IDENTITY = {"data": "d1", "config": "c1", "code": "k1", "architecture": "a1"}


def _checkpoint(step: int = 3) -> Checkpoint:
    tensors = {"model.weight": torch.arange(6.0).view(2, 3) + step, "scalar": torch.tensor(7)}
    return Checkpoint(step, IDENTITY, {"history": [{"loss": 0.1 + 0.2}]}, tensors)


def test_a_checkpoint_survives_the_round_trip_bitwise() -> None:
    before = _checkpoint()
    after = decode(before.encode(), "x")
    assert (after.step, after.identity, after.progress) == (3, IDENTITY, before.progress)
    assert after.tensors.keys() == before.tensors.keys()
    assert all(torch.equal(before.tensors[name], after.tensors[name]) for name in after.tensors)


@pytest.mark.parametrize("kept", [0, 7, 8, 100, -1])
def test_a_truncated_checkpoint_is_refused(kept: int) -> None:
    with pytest.raises(CheckpointRefused, match=r"step-3 \(\d+ bytes\) is no whole safetensors"):
        decode(_checkpoint().encode()[:kept], "step-3")


def test_every_flipped_byte_is_refused() -> None:
    whole = _checkpoint().encode()
    for place in range(len(whole)):
        broken = bytearray(whole)
        broken[place] ^= 1
        with pytest.raises(CheckpointRefused):
            decode(bytes(broken), "x")


def test_another_safetensors_file_is_refused() -> None:
    with pytest.raises(CheckpointRefused, match="has format None; expected 'mnist-cnn"):
        decode(save({"weight": torch.ones(2)}), "x")


class _Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('the payload ran')",)


def test_a_pickle_is_refused_and_does_not_run() -> None:
    with pytest.raises(CheckpointRefused, match="no whole safetensors"):
        decode(pickle.dumps(_Bomb()), "x")


def test_a_digest_that_was_made_to_fit_other_tensors_is_needed_to_alter_them() -> None:
    content = _checkpoint().encode()
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length])["__metadata__"]
    altered = {name: tensor + 1 for name, tensor in load(content).items()}
    with pytest.raises(CheckpointRefused, match="it was altered"):
        decode(save(altered, metadata), "x")


def test_the_newest_valid_checkpoint_is_found_behind_a_broken_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = LocalCheckpoints(tmp_path)
    for step in (1, 2):
        store.save(_checkpoint(step).name, _checkpoint(step).encode())
    store.save(_checkpoint(9).name, _checkpoint(9).encode()[:-5])
    found, refusals = newest_valid(store, IDENTITY)
    assert found is not None
    assert found.step == 2
    assert len(refusals) == 1
    assert "step-00000009" in refusals[0]
    assert refusals[0] in caplog.text


@pytest.mark.parametrize("part", IDENTITY)
def test_a_checkpoint_of_something_else_is_refused_with_both_values(
    tmp_path: Path, part: str
) -> None:
    store = LocalCheckpoints(tmp_path)
    other = replace(_checkpoint(), identity={**IDENTITY, part: "other"})
    store.save(other.name, other.encode())
    found, refusals = newest_valid(store, IDENTITY)
    assert found is None
    sentence = (
        f"checkpoint step-00000003.safetensors was written with other {part} than this training: "
        f"{part} 'other', expected '{IDENTITY[part]}'"
    )
    assert refusals == [sentence]


def test_an_empty_store_has_no_checkpoint(tmp_path: Path) -> None:
    assert newest_valid(LocalCheckpoints(tmp_path / "nothing"), IDENTITY) == (None, [])


def test_a_store_that_cannot_be_read_is_not_taken_for_an_empty_one() -> None:
    class Gone(LocalCheckpoints):
        def list(self) -> list[str]:
            raise ConnectionError("S3 is gone")

    with pytest.raises(ConnectionError, match="S3 is gone"):
        newest_valid(Gone(Path()), IDENTITY)


def test_a_folder_keeps_the_newest_and_no_draft(tmp_path: Path) -> None:
    store = LocalCheckpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        store.save(_checkpoint(step).name, b"x")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000002.safetensors",
        "step-00000003.safetensors",
    ]


def test_a_save_that_was_cut_off_is_never_listed(tmp_path: Path) -> None:
    (tmp_path / ".step-00000005.safetensors.77").write_bytes(b"half")
    assert LocalCheckpoints(tmp_path).list() == []


class _Slow(LocalCheckpoints):
    """Waits for permission before each save, and fails while `broken`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.entered, self.allowed, self.broken = threading.Event(), threading.Event(), False

    def save(self, name: str, content: bytes) -> None:
        self.entered.set()
        assert self.allowed.wait(10)
        if self.broken:
            raise OSError(28, "No space left on device")
        super().save(name, content)


def test_a_slow_store_gets_the_newest_and_skips_those_between(tmp_path: Path) -> None:
    store = _Slow(tmp_path)
    writer = Writer(store)
    writer.submit(_checkpoint(1))
    assert store.entered.wait(10)
    writer.submit(_checkpoint(2))
    writer.submit(_checkpoint(3))
    store.allowed.set()
    writer.close()
    assert sorted(store.list()) == ["step-00000001.safetensors", "step-00000003.safetensors"]
    assert writer.newest == 3


def test_a_failed_write_is_said_and_the_next_one_is_tried(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = _Slow(tmp_path)
    store.broken = True
    store.allowed.set()
    writer = Writer(store)
    writer.submit(_checkpoint(1))
    while not writer.failures:
        pass
    store.broken = False
    writer.submit(_checkpoint(2))
    writer.close()
    assert store.list() == ["step-00000002.safetensors"]
    assert len(writer.failures) == 1
    assert "step-00000001.safetensors could not be written" in caplog.text
    assert "No space left on device" in caplog.text


def test_the_digest_covers_names_types_and_shapes() -> None:
    flat = replace(_checkpoint(), tensors={"a": torch.zeros(4)})
    square = replace(_checkpoint(), tensors={"a": torch.zeros(2, 2)})
    digests = set()
    for checkpoint in (flat, square):
        content = checkpoint.encode()
        length = int.from_bytes(content[:8], "little")
        digests.add(json.loads(content[8 : 8 + length])["__metadata__"]["sha256"])
    assert len(digests) == 2
    assert all(len(digest) == len(hashlib.sha256().hexdigest()) for digest in digests)
