"""Later epochs show what was hard; whoever is killed in the middle shows the same."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mnist_cnn.digits import Digits
from mnist_cnn.sample import embedded_sample
from mnist_cnn.training import LocalCheckpoints, TrainingConfig, TrainingStopped, train
from mnist_cnn.training.hard_examples import HardExamples
from mnist_cnn.training.loader import Batches

CPU = torch.device("cpu")


def test_a_round_shows_each_of_the_hardest_once_and_the_next_round_in_another_order() -> None:
    hard = HardExamples(1000, 0.2, 10, CPU)
    assert hard.round_steps == 20
    losses = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    hard.note(torch.arange(1000), losses)
    hard.begin_round()
    expected = set(losses.half().float().argsort(descending=True, stable=True)[:200].tolist())
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(1))
    rounds = [hard.choose(number, order).tolist() for number in range(5)]
    assert all(set(shown) == expected and len(shown) == 200 for shown in rounds)
    assert len({tuple(shown) for shown in rounds}) == 5


def test_what_was_never_shown_counts_as_hardest() -> None:
    hard = HardExamples(1000, 0.2, 10, CPU)
    hard.note(torch.arange(990), torch.full((990,), 5.0))
    hard.begin_round()
    shown = hard.choose(0, torch.randperm(1000))
    assert set(range(990, 1000)) <= set(shown.tolist())


def test_losses_that_are_noted_during_a_round_count_from_the_next_one_on() -> None:
    hard = HardExamples(100, 0.2, 2, CPU)
    hard.note(torch.arange(100), torch.arange(100.0))
    hard.begin_round()
    before = hard.choose(0, torch.arange(100))
    hard.note(before, torch.zeros(20))
    assert torch.equal(hard.choose(0, torch.arange(100)), before)
    hard.begin_round()
    assert set(hard.choose(0, torch.arange(100)).tolist()) == set(range(60, 80))


def test_a_small_data_set_is_shown_whole() -> None:
    batches = Batches(embedded_sample()[0], TrainingConfig(batch_size=256), CPU)
    shown = [label for _, label in take(batches, 3 * batches.per_epoch)]
    counts = np.bincount(torch.cat(shown).numpy()) / np.bincount(embedded_sample()[0].labels)
    assert counts == pytest.approx(counts.mean(), rel=0.1)


def take(batches: Batches, steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Take batches whose losses are their labels: the nines are hardest."""
    taken = []
    for images, labels in batches.start(0):
        batches.note(labels.float())
        taken.append((images, labels))
        if len(taken) == steps:
            break
    return taken


@pytest.fixture(scope="module")
def digits() -> Digits:
    return embedded_sample()[0]


# 89 steps an epoch of the sample, of which a round of hard images is 18.
CONFIG = TrainingConfig(batch_size=16, epochs=2.4, min_steps=0, precision="fp32", seed=5)


def test_the_first_epoch_shows_everything_and_the_next_what_was_hard(digits: Digits) -> None:
    batches = Batches(digits, CONFIG, CPU)
    shown = [labels for _, labels in take(batches, 2 * batches.per_epoch)]
    first, later = torch.cat(shown[: batches.per_epoch]), torch.cat(shown[batches.per_epoch :])
    assert set(first.tolist()) == set(range(10))
    # What filled no batch of the first epoch comes once; else a fifth: nines, eights, few sevens.
    left_out = len(digits) - batches.per_epoch * 16
    assert (later < 7).sum() <= left_out
    assert (later == 9).sum() == pytest.approx(5 * (digits.labels == 9).sum(), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("step", [30, 89, 97, 107, 160])
def test_a_training_that_is_stopped_in_any_round_ends_with_the_same_weights(
    digits: Digits, tmp_path: Path, step: int
) -> None:
    whole = train(digits, CONFIG, "cpu")
    asked = iter(range(10_000))
    store = LocalCheckpoints(tmp_path)
    with pytest.raises(TrainingStopped):
        train(
            digits,
            CONFIG,
            "cpu",
            checkpoints=store,
            stop=lambda: "a test" if next(asked) == step else None,
        )
    resumed = train(digits, CONFIG, "cpu", checkpoints=store)
    assert resumed.resumed_from == step
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


def test_two_processes_share_the_batches_that_one_would_show(digits: Digits) -> None:
    many = Digits(np.tile(digits.images, (8, 1, 1)), np.tile(digits.labels, 8))
    config = TrainingConfig(batch_size=512, seed=5)
    alone, left, right = (
        Batches(many, config, CPU, rank, world) for rank, world in ((0, 1), (0, 2), (1, 2))
    )
    assert alone.per_epoch > 2 * 10  # a round is shorter than an epoch
    three = zip(alone.start(0), left.start(0), right.start(0), strict=True)
    for _ in range(2 * alone.per_epoch):
        (images, labels), *halves = next(three)
        assert torch.equal(labels, torch.cat([half for _, half in halves]))
        assert torch.equal(images, torch.cat([half for half, _ in halves]))
        for batches in (alone, left, right):
            batches.note(labels.float())
