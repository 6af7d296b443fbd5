import numpy as np
import pytest
from scipy.optimize import linprog

from mnist_cnn.digits import SIDE, Digits
from mnist_cnn.evaluation.corruptions import CORRUPTIONS, condition
from mnist_cnn.evaluation.factors import RADIUS, reweight, score_conditions, slice_by_style
from mnist_cnn.evaluation.intervals import percentiles, resample, wilson
from mnist_cnn.evaluation.shift import measure_shift
from mnist_cnn.styles import measure_styles

Splits = tuple[Digits, Digits]

LABELS = np.array([1, 2, 3, 3])


def stroke(slope: float, width: int = 3) -> np.ndarray:
    """Draw one stroke that moves `slope` pixels to the right for each pixel upwards."""
    image = np.zeros((1, SIDE, SIDE), np.uint8)
    for row in range(4, 24):
        middle = 14 + round(slope * (14 - row))
        image[0, row, middle - width // 2 : middle - width // 2 + width] = 255
    return image


def test_slant_is_measured_in_degrees_to_the_right() -> None:
    assert measure_styles(stroke(0))["slant"][0] == pytest.approx(0, abs=1)
    assert measure_styles(stroke(0.5))["slant"][0] == pytest.approx(26.6, abs=1.5)
    assert measure_styles(stroke(-0.5))["slant"][0] == pytest.approx(-26.6, abs=1.5)


def test_stroke_width_and_aspect_are_those_of_the_drawing() -> None:
    narrow, wide = measure_styles(stroke(0, 2)), measure_styles(stroke(0, 4))
    # An upright outline crosses 4/pi fewer pixel edges than the average direction does.
    assert narrow["stroke width"][0] == pytest.approx(2 * 4 / np.pi * 20 / 22)
    assert wide["stroke width"][0] == pytest.approx(4 * 4 / np.pi * 20 / 24)
    assert wide["aspect"][0] == pytest.approx(4 / 20)
    assert wide["ink"][0] == pytest.approx(80 / 784)


def test_a_blank_image_has_no_style_but_ink() -> None:
    styles = measure_styles(np.zeros((2, SIDE, SIDE), np.uint8))
    assert np.isnan(styles["slant"]).all()
    assert styles["ink"].tolist() == [0, 0]


def test_styles_do_not_depend_on_the_batch(splits: Splits) -> None:
    images = splits[1].images
    whole, parts = measure_styles(images), measure_styles(images, 100)
    assert all(np.allclose(whole[style], parts[style], rtol=1e-5) for style in whole)


def test_a_split_has_no_distance_from_itself(splits: Splits) -> None:
    shift = measure_shift(splits[1], splits[1])
    assert shift.label_distance == 0
    assert {style.distance for style in shift.styles} == {0}


def test_a_slanted_split_is_far_in_slant_only(splits: Splits) -> None:
    images = splits[1].images
    shifted = Digits(np.stack([np.roll(image, 1, 1) for image in images]), splits[1].labels)
    assert {s.style: s.distance for s in measure_shift(splits[1], shifted).styles}["ink"] == 0
    tall = Digits(np.concatenate([stroke(0.5)] * 5), np.ones(5, np.int64))
    upright = Digits(np.concatenate([stroke(0)] * 5), np.ones(5, np.int64))
    by_style = {style.style: style for style in measure_shift(upright, tall).styles}
    assert by_style["slant"].distance == 1


def test_an_empty_split_cannot_be_compared(splits: Splits) -> None:
    empty = Digits(splits[1].images[:0], splits[1].labels[:0])
    with pytest.raises(ValueError, match="the test split has no images"):
        measure_shift(splits[0], empty)


def test_a_condition_without_predictions_is_a_gap_and_not_a_zero() -> None:
    first = CORRUPTIONS[0]
    names = [condition(first, strength) for strength in first.strengths]
    results = score_conditions(
        (first,), {names[0]: np.array([1, 2, 3, 4], np.uint8)}, {names[1]: "it broke"}, LABELS
    )
    assert results[0].accuracy == 0.75
    assert results[0].gap is None
    assert (results[1].accuracy, results[1].interval, results[1].gap) == (None, None, "it broke")
    assert results[2].gap == "not measured"


def test_slices_hold_every_image_once(splits: Splits) -> None:
    styles = measure_styles(splits[1].images)
    slices = slice_by_style(styles, np.ones(len(splits[1]), bool))
    for style in styles:
        parts = [part for part in slices if part.style == style]
        assert sum(part.images for part in parts) == len(splits[1])
        assert all(part.accuracy == 1 for part in parts)


def test_slices_find_the_style_that_is_misread() -> None:
    slant = np.arange(100.0)
    right = slant < 80
    parts = slice_by_style({"slant": slant}, right)
    assert [part.accuracy for part in parts] == [1, 1, 1, 1, 0]


def test_equal_values_stay_in_one_slice() -> None:
    parts = slice_by_style({"slant": np.zeros(10)}, np.ones(10, bool))
    assert [part.images for part in parts] == [10]


def random_confusion() -> np.ndarray:
    mistakes = np.random.default_rng(0).integers(1, 50, (10, 10))
    confusion: np.ndarray = mistakes + 400 * np.eye(10, dtype=int)
    return confusion


def test_the_worst_priors_are_those_of_a_linear_program() -> None:
    confusion = random_confusion()
    priors, recall = confusion.sum(1) / confusion.sum(), confusion.diagonal() / confusion.sum(1)
    # Variables: what is added to and what is taken from each digit.
    solved = linprog(
        np.concatenate([recall, -recall]),
        A_ub=[[0] * 10 + [1] * 10],
        b_ub=[RADIUS],
        A_eq=[[1] * 10 + [-1] * 10],
        b_eq=[0],
        bounds=[(0, 1)] * 10 + [(0, share) for share in priors],
    )
    worst = reweight(confusion, None).worst
    assert worst.accuracy == pytest.approx(priors @ recall + solved.fun)
    assert sum(worst.priors) == pytest.approx(1)
    assert np.abs(np.array(worst.priors) - priors).sum() / 2 <= RADIUS + 1e-12


def test_uniform_priors_give_the_mean_recall() -> None:
    confusion = random_confusion()
    uniform = reweight(confusion, None).scenarios[0]
    assert uniform.accuracy == pytest.approx((confusion.diagonal() / confusion.sum(1)).mean())


def test_a_prior_on_a_digit_without_images_is_a_gap() -> None:
    confusion = random_confusion()
    confusion[3] = 0
    found = reweight(confusion, None)
    assert found.scenarios[0].accuracy is None
    assert found.scenarios[0].gap == "no test image shows 3"
    assert found.worst.accuracy is not None
    assert found.worst.priors[3] == 0


def test_the_training_priors_are_a_scenario(splits: Splits) -> None:
    shift = measure_shift(*splits)
    names = [scenario.name for scenario in reweight(random_confusion(), shift).scenarios]
    assert "as in the training split" in names


def test_wilson_agrees_with_its_published_example_and_is_honest_at_the_ends() -> None:
    # Newcombe 1998, Statistics in Medicine 17, 857-872: 81 of 263 gives 0.2553 to 0.3662.
    interval = wilson(81, 263)
    assert (interval.low, interval.high) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(100, 100).low < 0.98
    assert wilson(0, 100).high > 0.02


def test_the_bootstrap_finds_the_spread_of_a_mean() -> None:
    values = np.random.default_rng(1).normal(size=2000)
    means = resample(2000, 500, 0) @ values / 2000
    interval = percentiles(means)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 / np.sqrt(2000), rel=0.1)


def test_a_resample_holds_as_many_images_as_the_split() -> None:
    assert (resample(50, 4, 0).sum(1) == 50).all()
