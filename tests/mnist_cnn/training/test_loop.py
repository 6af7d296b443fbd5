import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from mnist_cnn.digits import Digits
from mnist_cnn.evaluation import predict
from mnist_cnn.model import DigitCNN
from mnist_cnn.sample import embedded_sample
from mnist_cnn.training import (
    AccuracyCollapsed,
    EpochMetrics,
    LocalCheckpoints,
    Progress,
    Training,
    TrainingConfig,
    TrainingStopped,
    train,
)
from mnist_cnn.training import loop as training
from mnist_cnn.training.learner import Learner
from mnist_cnn.training.loader import Batches
from mnist_cnn.training.optimizer import Optimizer

# 22 steps an epoch of the sample, 33 in all; fp32 is the same on every processor.
SMALL = TrainingConfig(
    epochs=1.5, batch_size=64, min_steps=0, precision="fp32", checkpoint_every_steps=5
)
STEPS, PER_EPOCH = 33, 22


@pytest.fixture(scope="module")
def sample() -> tuple[Digits, Digits]:
    return embedded_sample()


@pytest.fixture(scope="module")
def digits(sample: tuple[Digits, Digits]) -> Digits:
    return sample[0]


@pytest.fixture(scope="module")
def uninterrupted(digits: Digits) -> Training:
    return train(digits, SMALL, "cpu")


def _weights(model: DigitCNN) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _same(left: Training, right: Training) -> bool:
    ours, theirs = _weights(left.model), _weights(right.model)
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def _numbers(history: list[EpochMetrics]) -> list[tuple[float, ...]]:
    return [(each.epoch, each.step, each.loss, each.accuracy) for each in history]


def _stop_at(step: int) -> Callable[[], str | None]:
    """Ask for a stop when so many steps have been taken in this call."""
    asked = iter(range(step + 1))
    return lambda: "SIGTERM" if next(asked) == step else None


# Exact


def test_the_same_seed_gives_bitwise_the_same_weights(
    digits: Digits, uninterrupted: Training
) -> None:
    again = train(digits, SMALL, "cpu")
    assert _same(again, uninterrupted)
    assert _numbers(again.history) == _numbers(uninterrupted.history)


def test_another_seed_gives_other_weights(digits: Digits, uninterrupted: Training) -> None:
    assert not _same(train(digits, SMALL.model_copy(update={"seed": 1}), "cpu"), uninterrupted)


def test_training_leaves_the_global_random_state_alone(digits: Digits) -> None:
    before = torch.get_rng_state()
    train(digits, SMALL.model_copy(update={"epochs": 0.1}), "cpu", stop=lambda: None)
    assert torch.equal(before, torch.get_rng_state())


def test_the_loss_follows_the_golden_curve(digits: Digits) -> None:
    """Instruction sets from SSE4.1 to AVX-512 differ by 0.0001 at first and by 0.01 at the end."""
    curve = json.loads((Path(__file__).parent / "golden_loss_curve.json").read_text())
    config = TrainingConfig(**curve["config"])
    seen = train(digits, config, "cpu").history
    for metrics, loss, tolerance in zip(seen, curve["loss"], curve["tolerance"], strict=True):
        assert metrics.loss == pytest.approx(loss, rel=tolerance), f"epoch {metrics.epoch}"


@pytest.mark.slow
def test_the_default_config_learns_the_sample_in_a_few_steps(
    sample: tuple[Digits, Digits],
) -> None:
    held_in, held_out = sample
    result = train(held_in, TrainingConfig(), "cpu")
    predicted = predict(result.model, held_out.images).argmax(1)
    assert (predicted == held_out.labels).mean() >= 0.98
    assert result.outcome == "finished"
    assert result.steps == result.history[-1].step == TrainingConfig().min_steps


def test_images_in_a_memory_map_give_the_same_weights(
    digits: Digits, uninterrupted: Training, tmp_path: Path
) -> None:
    np.save(tmp_path / "images.npy", digits.images)
    mapped = Digits(np.load(tmp_path / "images.npy", mmap_mode="r"), digits.labels)
    assert _same(train(mapped, SMALL, "cpu"), uninterrupted)


def test_batches_from_the_device_are_those_streamed_from_the_host(digits: Digits) -> None:
    streamed = Batches(digits, SMALL, torch.device("cpu"))
    resident = Batches(digits, SMALL, torch.device("cpu"))
    resident._resident = torch.tensor(digits.images)
    ours, theirs = streamed.start(3), resident.start(3)
    for _ in range(25):
        for left, right in zip(next(ours), next(theirs), strict=True):
            assert torch.equal(left, right)


def test_processes_share_the_batches_of_one(digits: Digits) -> None:
    config = TrainingConfig(batch_size=512)
    place = torch.device("cpu")
    whole = next(Batches(digits, config, place).start(1))
    parts = [next(Batches(digits, config, place, rank, 2).start(1)) for rank in range(2)]
    for together, *apart in zip(whole, *parts, strict=True):
        assert torch.equal(together, torch.cat(apart))


def test_an_epoch_shows_every_image_at_most_once(
    digits: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = SMALL.recipe().model_copy(
        update={"shift": 0, "degrees": 0, "stretch": 0, "blur_every": 0}
    )
    monkeypatch.setattr(TrainingConfig, "recipe", lambda _: plain)
    numbers = np.arange(len(digits))
    images = digits.images.copy()
    images[:, 0, 0], images[:, 0, 1] = numbers % 256, numbers // 256
    batches = Batches(Digits(images, digits.labels), SMALL, torch.device("cpu")).start(0)
    seen = torch.cat([next(batches)[0] for _ in range(PER_EPOCH)]).numpy().astype(int)
    assert len(set(seen[:, 0, 0] + 256 * seen[:, 0, 1])) == PER_EPOCH * 64


# Resumable


@pytest.mark.parametrize("step", [1, 5, 21, 22, 23, 32])
def test_stopped_at_any_step_and_resumed_equals_uninterrupted(
    digits: Digits, uninterrupted: Training, tmp_path: Path, step: int
) -> None:
    store = LocalCheckpoints(tmp_path)
    with pytest.raises(TrainingStopped, match=rf"step {step} of 33 \(SIGTERM\); run it again"):
        train(digits, SMALL, "cpu", checkpoints=store, stop=_stop_at(step))
    resumed = train(digits, SMALL, "cpu", checkpoints=store)
    assert resumed.resumed_from == step
    assert _same(resumed, uninterrupted)
    assert _numbers(resumed.history) == _numbers(uninterrupted.history)


@pytest.mark.slow
def test_killed_and_run_again_equals_uninterrupted(
    digits: Digits, uninterrupted: Training, tmp_path: Path
) -> None:
    program = f"""
import os, signal
from pathlib import Path
from mnist_cnn.training.checkpoint import LocalCheckpoints
from mnist_cnn.sample import embedded_sample
from mnist_cnn.training import TrainingConfig, train
import torch
torch.set_num_threads({torch.get_num_threads()})
store = LocalCheckpoints(Path({str(tmp_path)!r}))
steps = iter(range(1000))
def kill():
    if next(steps) == 27:
        while not any("20" in name for name in store.list()):
            pass
        os.kill(os.getpid(), signal.SIGKILL)
config = TrainingConfig.model_validate_json('''{SMALL.model_dump_json()}''')
train(embedded_sample()[0], config, "cpu", checkpoints=store, stop=kill)
"""
    killed = subprocess.run(
        [sys.executable, "-c", program],
        check=False,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert killed.returncode == -signal.SIGKILL
    told: list[EpochMetrics] = []
    resumed = train(
        digits, SMALL, "cpu", checkpoints=LocalCheckpoints(tmp_path), on_epoch=told.append
    )
    assert resumed.resumed_from in {20, 25}
    assert _same(resumed, uninterrupted)
    assert told[-1] == resumed.history[-1]


def test_a_finished_training_run_again_takes_no_step(
    digits: Digits, uninterrupted: Training, tmp_path: Path
) -> None:
    store = LocalCheckpoints(tmp_path)
    train(digits, SMALL, "cpu", checkpoints=store)
    again = train(digits, SMALL, "cpu", checkpoints=store, stop=lambda: "a step was taken")
    assert again.resumed_from == again.steps == STEPS
    assert _same(again, uninterrupted)
    assert _numbers(again.history) == _numbers(uninterrupted.history)


def test_a_broken_newest_checkpoint_costs_one_interval(
    digits: Digits, uninterrupted: Training, tmp_path: Path
) -> None:
    store = LocalCheckpoints(tmp_path)
    with pytest.raises(TrainingStopped):
        train(digits, SMALL, "cpu", checkpoints=store, stop=_stop_at(12))
    newest = tmp_path / max(store.list())
    newest.write_bytes(newest.read_bytes()[:-1])
    resumed = train(digits, SMALL, "cpu", checkpoints=store)
    assert resumed.resumed_from is not None
    assert resumed.resumed_from < 12
    assert "no whole safetensors" in resumed.warnings[0]
    assert _same(resumed, uninterrupted)


@pytest.mark.parametrize(
    ("part", "change"), [("config", {"learning_rate": 0.02}), ("config", {"seed": 5})]
)
def test_a_checkpoint_of_another_config_is_not_gone_on_from(
    digits: Digits, tmp_path: Path, part: str, change: dict[str, Any]
) -> None:
    store = LocalCheckpoints(tmp_path)
    with pytest.raises(TrainingStopped):
        train(digits, SMALL.model_copy(update=change), "cpu", checkpoints=store, stop=_stop_at(2))
    begun = train(digits, SMALL, "cpu", checkpoints=store, stop=lambda: None)
    assert begun.resumed_from is None
    assert f"was written with other {part} than this training" in begun.warnings[0]


def test_a_checkpoint_of_other_data_is_not_gone_on_from(digits: Digits, tmp_path: Path) -> None:
    store = LocalCheckpoints(tmp_path)
    other = Digits(digits.images[::-1].copy(), digits.labels[::-1].copy())
    with pytest.raises(TrainingStopped):
        train(other, SMALL, "cpu", checkpoints=store, stop=_stop_at(2))
    begun = train(digits, SMALL, "cpu", checkpoints=store)
    assert begun.resumed_from is None
    assert "was written with other data than this training" in begun.warnings[0]


def test_the_interval_of_checkpoints_may_change_between_runs(
    digits: Digits, uninterrupted: Training, tmp_path: Path
) -> None:
    store = LocalCheckpoints(tmp_path)
    with pytest.raises(TrainingStopped):
        train(digits, SMALL, "cpu", checkpoints=store, stop=_stop_at(7))
    often = SMALL.model_copy(update={"checkpoint_every_steps": 1})
    resumed = train(digits, often, "cpu", checkpoints=store)
    assert resumed.resumed_from == 7
    assert _same(resumed, uninterrupted)


def test_training_goes_on_while_the_store_is_gone(
    digits: Digits, uninterrupted: Training, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Flaky(LocalCheckpoints):
        def save(self, name: str, content: bytes) -> None:
            if "10" in name:
                raise ConnectionError("S3 is gone")
            super().save(name, content)

    result = train(digits, SMALL, "cpu", checkpoints=Flaky(tmp_path), on_progress=print)
    assert _same(result, uninterrupted)
    assert max(LocalCheckpoints(tmp_path).list()) == "step-00000033.safetensors"
    if result.warnings:  # a newer one may have overtaken the tenth step's
        assert "S3 is gone" in result.warnings[0]
        assert result.warnings[0] in caplog.text


def test_a_stop_without_a_store_says_that_nothing_was_kept(digits: Digits) -> None:
    with pytest.raises(TrainingStopped, match="there is no checkpoint of it") as stopped:
        train(digits, SMALL, "cpu", stop=_stop_at(3))
    assert (stopped.value.step, stopped.value.saved) == (3, False)


def test_a_stop_whose_checkpoint_fails_says_that_nothing_was_kept(
    digits: Digits, tmp_path: Path
) -> None:
    class Gone(LocalCheckpoints):
        def save(self, name: str, content: bytes) -> None:
            raise OSError(28, f"No space left on device for {name}, {len(content)} bytes")

    with pytest.raises(TrainingStopped, match="there is no checkpoint of it"):
        train(digits, SMALL, "cpu", checkpoints=Gone(tmp_path), stop=_stop_at(3))


# Guards


class _Hungry(DigitCNN):
    """Has memory for so many images at a time."""

    room = 256

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = super().forward(images)
        if torch.is_grad_enabled() and len(images) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")
        return logits


def test_lack_of_memory_halves_the_micro_batch_and_is_said(
    digits: Digits, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = TrainingConfig(
        batch_size=1024, micro_batch=1024, epochs=4, min_steps=0, precision="fp32"
    )
    plenty = train(digits, config, "cpu")
    monkeypatch.setattr("mnist_cnn.training.learner.DigitCNN", _Hungry)
    scarce = train(digits, config, "cpu")
    assert (plenty.micro_batch, scarce.micro_batch) == (1024, 256)
    assert "no memory for 1024 images at a time; going on with 512" in scarce.warnings[0]
    assert "no memory for 512 images at a time; going on with 256" in scarce.warnings[1]
    assert scarce.warnings[1] in caplog.text
    assert [m.loss for m in scarce.history] == pytest.approx([m.loss for m in plenty.history], 1e-4)


def test_gradients_do_not_depend_on_the_micro_batch(digits: Digits) -> None:
    gradients: list[torch.Tensor] = []
    for micro in (1024, 512, 256):
        config = TrainingConfig(batch_size=1024, micro_batch=micro, precision="fp32")
        place = torch.device("cpu")
        learner = Learner(config, place, share=1024, world=1)
        learner._gradients(*next(Batches(digits, config, place).start(0)))
        gradients.append(torch.cat([p.grad.flatten() for p in learner.model.parameters()]))  # type: ignore[union-attr]  # all have one
    for other in gradients[1:]:
        assert (other - gradients[0]).norm() < 1e-4 * gradients[0].norm()


def test_lack_of_memory_for_the_smallest_piece_is_an_error(
    digits: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Hungry, "room", 10)
    monkeypatch.setattr("mnist_cnn.training.learner.DigitCNN", _Hungry)
    with pytest.raises(MemoryError, match="no memory for 64 images at a time, and fewer would"):
        train(digits, SMALL, "cpu")


def test_a_weight_that_is_not_finite_is_an_error_and_is_not_kept(
    digits: Digits, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    step = Optimizer.step

    def poisoned(self: Optimizer, count: int, factor: float) -> None:
        step(self, count, factor)
        if count == 13:
            with torch.no_grad():
                self.parameters[0][0, 0, 0, 0] = torch.nan

    monkeypatch.setattr(Optimizer, "step", poisoned)
    store = LocalCheckpoints(tmp_path)
    with pytest.raises(FloatingPointError, match="not finite by step 15; expected finite"):
        train(digits, SMALL, "cpu", checkpoints=store)
    assert max(store.list()) <= "step-00000010.safetensors"


def test_a_weight_that_is_not_finite_after_the_last_step_is_an_error(
    digits: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Optimizer.step

    def poisoned(self: Optimizer, count: int, factor: float) -> None:
        step(self, count, factor)
        if count == STEPS:
            with torch.no_grad():
                self.parameters[0][0, 0, 0, 0] = torch.inf

    monkeypatch.setattr(Optimizer, "step", poisoned)
    with pytest.raises(FloatingPointError, match="by step 33"):
        train(digits, SMALL, "cpu")


def test_labels_that_mean_nothing_end_in_a_collapse(digits: Digits) -> None:
    shuffled = np.random.default_rng(0).permutation(digits.labels)
    with pytest.raises(AccuracyCollapsed, match=r"below 0.2000 .* check the labels"):
        train(Digits(digits.images, shuffled), SMALL, "cpu")


def test_an_accuracy_that_falls_by_half_is_a_collapse(
    digits: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Optimizer.step

    def ruined(self: Optimizer, count: int, factor: float) -> None:
        step(self, count, factor)
        if count > 22:
            with torch.no_grad():
                self.parameters[-1].copy_(torch.arange(10.0) * 100)

    monkeypatch.setattr(Optimizer, "step", ruined)
    with pytest.raises(AccuracyCollapsed, match="in epoch 2, below"):
        train(digits, SMALL.model_copy(update={"epochs": 3}), "cpu")


def test_a_spent_time_budget_ends_in_its_own_state_and_can_be_raised(
    digits: Digits, uninterrupted: Training, tmp_path: Path
) -> None:
    store = LocalCheckpoints(tmp_path)
    poor = SMALL.model_copy(update={"time_budget_seconds": 1e-6})
    cut = train(digits, poor, "cpu", checkpoints=store)
    assert (cut.outcome, cut.steps) == ("time budget", 1)
    assert predict(cut.model, digits.images[:5]).shape == (5, 10)
    resumed = train(digits, SMALL, "cpu", checkpoints=store)
    assert (resumed.outcome, resumed.resumed_from) == ("finished", 1)
    assert _same(resumed, uninterrupted)


@pytest.mark.slow
def test_patience_ends_training_only_if_it_is_configured(
    digits: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    falling = iter(range(1000, 0, -1))
    monkeypatch.setattr(
        "mnist_cnn.training.learner.Learner.validate", lambda *_: (1.0, next(falling) / 1000)
    )
    config = SMALL.model_copy(update={"epochs": 6, "validation_share": 0.1})
    assert len(train(digits, config, "cpu").history) == 6
    patient = train(digits, config.model_copy(update={"patience": 2}), "cpu")
    assert (patient.outcome, len(patient.history)) == ("early stop", 3)


def test_images_set_aside_are_measured_and_not_trained_on(digits: Digits) -> None:
    config = SMALL.model_copy(update={"validation_share": 0.25, "epochs": 3})
    batches = Batches(digits, config, torch.device("cpu"))
    assert len(batches.holdout) == round(len(digits) * 0.25)
    assert not set(batches.holdout.tolist()) & set(batches._training.tolist())
    history = train(digits, config, "cpu").history
    assert history[-1].validation_accuracy is not None
    assert history[-1].validation_accuracy > 0.9
    assert history[-1].validation_loss is not None


def test_patience_without_images_set_aside_is_refused() -> None:
    with pytest.raises(ValidationError, match="patience is 2 but validation_share is 0"):
        TrainingConfig(patience=2)


def test_an_empty_split_is_refused(digits: Digits) -> None:
    with pytest.raises(ValueError, match="the training split is empty"):
        train(Digits(digits.images[:0], digits.labels[:0]), SMALL, "cpu")


def test_a_missing_class_is_refused_by_name(digits: Digits) -> None:
    kept = (digits.labels != 3) & (digits.labels != 8)
    with pytest.raises(ValueError, match="no training image shows 3, 8; expected every digit"):
        train(Digits(digits.images[kept], digits.labels[kept]), SMALL, "cpu")


def test_a_batch_larger_than_the_data_is_refused_with_both_sizes(digits: Digits) -> None:
    with pytest.raises(ValueError, match="1438 training images are fewer than one batch of 2000"):
        train(digits, SMALL.model_copy(update={"batch_size": 2000}), "cpu")


def test_a_config_that_makes_zero_steps_is_refused(digits: Digits) -> None:
    with pytest.raises(ValueError, match=r"0.01 epochs of 22 steps and min_steps 0 make zero"):
        train(digits, SMALL.model_copy(update={"epochs": 0.01}), "cpu")


def test_a_device_that_is_not_there_is_refused_with_those_that_are(digits: Digits) -> None:
    absent = "mps" if not torch.backends.mps.is_available() else "cuda"
    with pytest.raises(ValueError, match=f"device '{absent}' is not on this machine; found"):
        train(digits, SMALL, absent)  # type: ignore[arg-type]  # a plain str


def test_a_micro_batch_that_splits_a_group_is_refused(digits: Digits) -> None:
    with pytest.raises(ValueError, match="micro_batch is 48; expected a multiple of 64"):
        train(digits, SMALL.model_copy(update={"micro_batch": 48}), "cpu")


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(ValidationError, match="epoch"):
        TrainingConfig(epoch=3)  # type: ignore[call-arg]  # the typo is the test


def test_a_field_that_is_set_replaces_the_presets_number() -> None:
    config = TrainingConfig(preset="best", epochs=2)
    assert config.recipe() == TrainingConfig(preset="best").recipe().model_copy(
        update={"epochs": 2}
    )


# Compiled


@pytest.mark.slow
def test_compiled_before_the_clock_starts_training_learns_the_same(
    digits: Digits, uninterrupted: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captured and differentiated ahead of time, but run by torch: Inductor takes minutes here."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    config = SMALL.model_copy(update={"compile": "always"})
    compiled = train(digits, config, "cpu")
    assert compiled.warmup_seconds > compiled.seconds / 10
    assert uninterrupted.warmup_seconds < 0.01
    losses = [each.loss for each in uninterrupted.history]
    assert [each.loss for each in compiled.history] == pytest.approx(losses, rel=0.01)


# Seen while it runs


def test_progress_is_told_after_each_interval(
    digits: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Progress] = []
    train(digits, SMALL, "cpu", on_progress=told.append)
    seldom = len(told)
    monkeypatch.setattr(training, "_SECONDS_BETWEEN_PROGRESS", 0)
    told.clear()
    train(digits, SMALL, "cpu", on_progress=told.append)
    assert [each.step for each in told] == list(range(1, STEPS + 1))
    assert all(each.steps == STEPS and each.images_per_second > 0 for each in told)
    assert told[-1].seconds_left == 0
    assert seldom < STEPS


def test_each_epoch_is_told_once(digits: Digits) -> None:
    told: list[EpochMetrics] = []
    result = train(digits, SMALL, "cpu", on_epoch=told.append)
    assert told == result.history
    assert [(each.epoch, each.step) for each in told] == [(1, 22), (2, 33)]


@pytest.mark.slow
def test_training_imports_no_compiler() -> None:
    """torch._dynamo costs more than a second, most of a quick training."""
    program = """
import sys
from mnist_cnn.sample import embedded_sample
from mnist_cnn.training import TrainingConfig, train
train(embedded_sample()[0], TrainingConfig(batch_size=64, epochs=1, min_steps=0), "cpu")
for heavy in ("torch._dynamo", "torchvision", "matplotlib", "safetensors"):
    assert heavy not in sys.modules, heavy
"""
    subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
