from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from torch import Generator, Tensor, nn

from mnist_cnn.digits import Digits
from mnist_cnn.evaluation import Evaluation, Outcomes, evaluate, measure, measure_all, predict
from mnist_cnn.evaluation.corruptions import CORRUPTIONS, Corruption
from mnist_cnn.evaluation.cost import measure_size, measure_times
from mnist_cnn.evaluation.saliency import map_saliency
from mnist_cnn.evaluation.shift import measure_shift
from mnist_cnn.model import DigitCNN

Splits = tuple[Digits, Digits]
Answer = Callable[[Tensor], Tensor]


def report(outcomes: Outcomes, digits: Digits, **extra: Any) -> Evaluation:
    return evaluate(outcomes, digits, model="models:/x/1", snapshot="abc", outcomes="o", **extra)


class Says(nn.Module):
    """Answers what a function of the batch says."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, images: Tensor) -> Tensor:
        return self.answer(images)


def test_two_evaluations_give_the_identical_report(
    reader: nn.Module, splits: Splits, outcomes: dict[str, Outcomes]
) -> None:
    again = measure(reader, splits[1])
    shift = measure_shift(*splits)
    reports = [
        report(found, splits[1], shift=shift, times=measure_times(reader, splits[1].images, 1.0, 5))
        for found in (outcomes["candidate"], again)
    ]
    once, twice = (each.model_dump_json(exclude={"times"}) for each in reports)
    assert once == twice


def test_a_report_survives_storage(
    splits: Splits, outcomes: dict[str, Outcomes], reader: nn.Module
) -> None:
    found = report(outcomes["candidate"], splits[1], size=measure_size(reader, 100))
    assert Evaluation.model_validate_json(found.model_dump_json()) == found


def test_the_outcomes_survive_storage_as_plain_arrays(
    tmp_path: Path, outcomes: dict[str, Outcomes]
) -> None:
    found = outcomes["candidate"]
    np.savez_compressed(tmp_path / "outcomes.npz", allow_pickle=False, **found.arrays())
    with np.load(tmp_path / "outcomes.npz") as stored:
        assert len(stored.files) == 1 + sum(len(c.strengths) for c in CORRUPTIONS)
        assert stored["slant=-15"].dtype == np.uint8
        assert np.array_equal(stored["slant=-15"], found.predictions["slant=-15"])


def test_two_models_see_the_very_same_images(splits: Splits) -> None:
    seen: dict[str, list[torch.Tensor]] = {"a": [], "b": []}

    def remember(name: str) -> nn.Module:
        def answer(images: Tensor) -> Tensor:
            seen[name].append(images.clone())
            return torch.zeros(len(images), 10)

        return Says(answer)

    few = Digits(splits[1].images[:30], splits[1].labels[:30])
    measure_all({name: remember(name) for name in seen}, few)
    assert len(seen["a"]) == 1 + sum(len(c.strengths) for c in CORRUPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(seen["a"], seen["b"], strict=True))


def test_one_model_alone_sees_what_it_sees_beside_another(
    reader: nn.Module, splits: Splits, outcomes: dict[str, Outcomes]
) -> None:
    alone = measure(reader, splits[1])
    for name, predicted in outcomes["candidate"].predictions.items():
        assert np.array_equal(alone.predictions[name], predicted)


def test_figures_agree_with_counting(splits: Splits, outcomes: dict[str, Outcomes]) -> None:
    labels, probabilities = splits[1].labels, outcomes["candidate"].probabilities
    found = report(outcomes["candidate"], splits[1])
    predicted = probabilities.argmax(1)
    assert found.accuracy == np.mean(predicted == labels)
    assert found.macro_f1 == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert np.sum(found.confusion) == len(labels)
    assert np.trace(found.confusion) == round(found.accuracy * len(labels))
    pair = found.confused[0]
    assert pair.images == np.sum((labels == pair.true) & (predicted == pair.predicted))
    assert found.loss == pytest.approx(
        np.mean(-np.log(probabilities[np.arange(len(labels)), labels])), rel=1e-5
    )


def test_the_intervals_hold_their_figures(splits: Splits, outcomes: dict[str, Outcomes]) -> None:
    found = report(outcomes["candidate"], splits[1])
    for name, value in (
        ("accuracy", found.accuracy),
        ("macro_f1", found.macro_f1),
        ("loss", found.loss),
        ("brier", found.calibration.brier),
    ):
        interval = getattr(found.intervals, name)
        assert interval.low < value < interval.high


def test_a_digit_without_a_test_image_is_a_gap_and_not_a_zero(
    splits: Splits, outcomes: dict[str, Outcomes]
) -> None:
    kept = splits[1].labels != 7
    found = outcomes["candidate"]
    fewer = replace(
        found,
        probabilities=found.probabilities[kept],
        predictions={name: each[kept] for name, each in found.predictions.items()},
    )
    digits = Digits(splits[1].images[kept], splits[1].labels[kept])
    measured = report(fewer, digits)
    assert measured.classes[7].support == 0
    assert measured.classes[7].recall is None
    assert measured.classes[7].f1 is None
    assert measured.gaps == ["no test image shows 7: its recall and F1 are unknown"]
    assert 0.5 < measured.macro_f1 <= 1
    assert Evaluation.model_validate_json(measured.model_dump_json()) == measured


def test_a_corruption_that_fails_is_a_gap_and_the_others_are_measured(
    reader: nn.Module, splits: Splits
) -> None:
    def fail(_images: Tensor, _strength: float, _noise: Generator) -> Tensor:
        raise RuntimeError("no such font")

    broken = Corruption("slant", "handwriting style", "degrees", (15,), "none", fail)
    found = measure_all({"a": reader}, splits[1], corruptions=(broken, CORRUPTIONS[-1]))["a"]
    assert "no such font" in found.gaps["slant=15"]
    assert "occlusion=8" in found.predictions
    measured = report(found, splits[1])
    gap = next(c for c in measured.conditions if (c.corruption, c.strength) == ("slant", 15))
    assert gap.accuracy is None
    assert "no such font" in str(gap.gap)
    assert any("no such font" in sentence for sentence in measured.gaps)


def test_nan_under_one_corruption_is_a_gap_of_that_model_only(
    reader: nn.Module, splits: Splits
) -> None:
    def bright_is_nan(images: Tensor) -> Tensor:
        logits = reader(images)
        return torch.where(images.amin((1, 2)).gt(20)[:, None], torch.nan, logits)

    models = {"good": reader, "bad": Says(bright_is_nan)}
    brightness = tuple(c for c in CORRUPTIONS if c.name == "brightness")
    found = measure_all(models, splits[1], corruptions=brightness)
    assert "NaN or infinity" in found["bad"].gaps["brightness=0.5"]
    assert "brightness=0.5" not in found["bad"].predictions
    assert not found["good"].gaps


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (lambda x: torch.full((len(x), 10), torch.nan), "champion: .*NaN or infinity for 30 of 30"),
        (lambda x: torch.zeros(len(x), 26), r"champion: .*returned \(30, 26\) .* expected \(30, 1"),
        (lambda x: x.reshape(-1, 32, 32), "champion: the model failed on uint8 images of 28 x 28"),
    ],
    ids=["nan", "other classes", "other size"],
)
def test_an_unusable_model_is_named_with_what_is_wrong(
    answer: Answer, sentence: str, splits: Splits
) -> None:
    few = Digits(splits[1].images[:30], splits[1].labels[:30])
    with pytest.raises(ValueError, match=sentence):
        measure_all({"champion": Says(answer)}, few)


def test_an_empty_split_is_refused(reader: nn.Module, splits: Splits) -> None:
    with pytest.raises(ValueError, match="test split is empty"):
        measure(reader, Digits(splits[1].images[:0], splits[1].labels[:0]))


def test_outcomes_of_another_split_are_refused(
    splits: Splits, outcomes: dict[str, Outcomes]
) -> None:
    with pytest.raises(ValueError, match="outcomes of 359 images but 1438 labels"):
        report(outcomes["candidate"], splits[0])


def test_a_loaded_program_is_measured_like_the_module_that_it_was(
    tmp_path: Path, splits: Splits
) -> None:
    torch.manual_seed(0)
    model = DigitCNN().eval()
    example = (torch.zeros(2, 28, 28, dtype=torch.uint8),)
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    torch.export.save(
        torch.export.export(model, example, dynamic_shapes=shapes), tmp_path / "m.pt2"
    )
    program = torch.export.load(tmp_path / "m.pt2").module()
    images = splits[1].images[:40]
    assert np.allclose(predict(model, images), predict(program, images), atol=1e-6)
    assert measure_size(program) == measure_size(model)
    wrong = torch.export.export(
        nn.Flatten(), (torch.zeros(2, 32, 32, dtype=torch.uint8),), dynamic_shapes=shapes
    ).module()
    with pytest.raises(ValueError, match="failed on uint8 images of 28 x 28"):
        predict(wrong, images)


def test_multiply_accumulates_are_those_of_the_layers() -> None:
    size = measure_size(nn.Sequential(Says(lambda x: x.float()), nn.Flatten(), nn.Linear(784, 10)))
    assert (size.parameters, size.multiply_accumulates) == (7850, 7840)


def test_read_only_images_are_measured(reader: nn.Module, splits: Splits) -> None:
    images = splits[1].images[:5].copy()
    images.flags.writeable = False
    assert predict(reader, images).shape == (5, 10)


def test_saliency_is_highest_where_the_answer_depends() -> None:
    model = Says(
        lambda x: (
            torch.eye(10)[torch.zeros(len(x), dtype=torch.long)]
            * x[:, 4:6, 4:6].sum((1, 2))[:, None]
            / 100
        )
    )
    image = np.full((1, 28, 28), 255, np.uint8)
    found = map_saliency(model, image)[0]
    row, column = np.unravel_index(found.argmax(), found.shape)
    assert (row, column) in {(4, 4), (4, 5), (5, 4), (5, 5)}
    assert found[20, 20] == pytest.approx(0, abs=1e-6)
