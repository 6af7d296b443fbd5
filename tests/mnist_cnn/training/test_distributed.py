import json
import os
import signal
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest
import torch

from mnist_cnn.digits import Digits
from mnist_cnn.sample import embedded_sample
from mnist_cnn.training import (
    EpochMetrics,
    LocalCheckpoints,
    Training,
    TrainingConfig,
    TrainingStopped,
    train,
    train_distributed,
)
from mnist_cnn.training.distributed import _EventLog

pytestmark = pytest.mark.slow

# 2 steps an epoch of the sample.
CONFIG = TrainingConfig(
    batch_size=512, epochs=6, min_steps=0, precision="fp32", checkpoint_every_steps=2
)


@pytest.fixture(scope="module")
def digits() -> Digits:
    return embedded_sample()[0]


@pytest.fixture(scope="module")
def alone(digits: Digits) -> Training:
    return train(digits, CONFIG, "cpu")


def _assert_close(left: Training, right: Training) -> None:
    """The stated tolerance: sums of two processes are rounded in another order."""
    ours, theirs = left.model.state_dict(), right.model.state_dict()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], atol=1e-3, rtol=1e-3)
    assert [m.loss for m in left.history] == pytest.approx([m.loss for m in right.history], 1e-4)
    assert [(m.epoch, m.step) for m in left.history] == [(m.epoch, m.step) for m in right.history]


def _workers() -> list[psutil.Process]:
    """Those of the launcher's children that train, oldest first."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            words = process.cmdline()
        except psutil.NoSuchProcess:  # another test's, which has just ended
            continue
        if "mnist_cnn.training.distributed" in words and "torch.distributed.run" not in words:
            found.append(process)
    return sorted(found, key=lambda process: process.pid)


def test_two_processes_of_which_one_is_killed_equal_one(digits: Digits, tmp_path: Path) -> None:
    store = LocalCheckpoints(tmp_path)
    killed: list[int] = []
    told: list[EpochMetrics] = []

    def kill_once(metrics: EpochMetrics) -> None:
        told.append(metrics)
        if not killed:
            victim = _workers()[-1].pid
            os.kill(victim, signal.SIGKILL)
            killed.append(victim)

    long = CONFIG.model_copy(update={"epochs": 20})
    together = train_distributed(digits, long, 2, "cpu", on_epoch=kill_once, checkpoints=store)
    assert killed
    assert [each.step for each in told] == [each.step for each in together.history]
    assert together.steps == 40
    _assert_close(together, train(digits, long, "cpu"))
    assert "step-00000040.safetensors" in store.list()


def test_a_stopped_group_can_be_gone_on_with_by_one_process(
    digits: Digits, alone: Training, tmp_path: Path
) -> None:
    store = LocalCheckpoints(tmp_path)
    with pytest.raises(TrainingStopped, match=r"of 12 \(SIGTERM\); run it again") as stopped:
        train_distributed(digits, CONFIG, 2, "cpu", checkpoints=store, stop=lambda: "SIGTERM")
    resumed = train(digits, CONFIG, "cpu", checkpoints=store)
    assert resumed.resumed_from == stopped.value.step
    assert resumed.warnings == []
    _assert_close(resumed, alone)


def test_digits_that_cannot_be_trained_with_start_no_process(digits: Digits) -> None:
    kept = digits.labels != 7
    without = Digits(digits.images[kept], digits.labels[kept])
    before = psutil.Process().children()  # servers of other tests, maybe
    with pytest.raises(ValueError, match="no training image shows 7"):
        train_distributed(without, CONFIG, 2, "cpu")
    assert psutil.Process().children() == before


def test_more_processes_than_a_batch_has_groups_are_refused(digits: Digits) -> None:
    with pytest.raises(ValueError, match="cannot be shared by 3 processes; use at most"):
        train_distributed(digits, CONFIG, 3, "cpu")


def test_an_event_of_the_workers_is_read_once_and_whole(tmp_path: Path) -> None:
    epoch = EpochMetrics(
        epoch=1,
        step=22,
        loss=0.5,
        accuracy=0.9,
        validation_loss=None,
        validation_accuracy=None,
        images_per_second=1.0,
        seconds_left=0.0,
    )
    line = json.dumps({"kind": "epoch", "about": asdict(epoch)}) + "\n"
    failure = json.dumps({"kind": "FloatingPointError", "about": {"sentence": "the loss is nan"}})
    path = tmp_path / "events.jsonl"
    epochs: list[EpochMetrics] = []
    events = _EventLog(path, print, epochs.append)
    events.read_new()
    path.write_text(line + line[:10])
    events.read_new()
    assert epochs == [epoch]
    path.write_text(line + line + failure + "\n")
    events.read_new()
    assert len(epochs) == 1
    assert isinstance(events.failure, FloatingPointError)
    assert str(events.failure) == "the loss is nan"
