import numpy as np
import pytest

from mnist_cnn.evaluation.calibration import bin_of, calibrate, measure_confidence


def says(*answers: tuple[int, float]) -> np.ndarray:
    """Return probabilities that give each digit its confidence and share out the rest."""
    rows = np.zeros((len(answers), 10))
    for row, (digit, confidence) in zip(rows, answers, strict=True):
        row[:] = (1 - confidence) / 9
        row[digit] = confidence
    return rows


def test_a_model_that_is_right_as_often_as_it_says_has_no_calibration_error() -> None:
    probabilities = says(*[(3, 0.75)] * 4)
    found = calibrate(probabilities, np.array([3, 3, 3, 1]))
    assert found.expected_error == pytest.approx(0, abs=1e-12)


def test_the_calibration_error_weighs_bins_by_their_images() -> None:
    probabilities = says((3, 0.95), (3, 0.95), (3, 0.95), (3, 0.5))
    found = calibrate(probabilities, np.array([3, 3, 3, 1]))
    assert found.expected_error == pytest.approx((3 * 0.05 + 0.5) / 4)


def test_the_brier_score_of_a_sure_error_is_two() -> None:
    assert calibrate(says((1, 1.0)), np.array([2])).brier == pytest.approx(2)
    assert calibrate(says((1, 1.0)), np.array([1])).brier == pytest.approx(0)


def test_a_bin_without_images_is_a_gap_and_not_a_zero() -> None:
    bins = calibrate(says((1, 0.99)), np.array([1])).bins
    assert [part.images for part in bins] == [0] * 14 + [1]
    assert bins[0].accuracy is None
    assert bins[0].confidence is None
    assert bins[14].accuracy == 1


def test_a_confidence_of_one_belongs_to_the_last_bin() -> None:
    assert bin_of(np.array([0.0, 1 / 15 + 1e-9, 1.0])).tolist() == [0, 1, 14]


def test_confident_errors_are_counted() -> None:
    found = measure_confidence(says((1, 0.99), (2, 0.6), (3, 0.9)), np.array([7, 7, 3]))
    assert (found.errors, found.confident_errors) == (2, 1)
    assert found.when_wrong == pytest.approx((0.99 + 0.6) / 2)
    assert found.ranking == pytest.approx(0.5)


def test_a_model_without_errors_has_no_confidence_in_them() -> None:
    found = measure_confidence(says((1, 0.99)), np.array([1]))
    assert found.errors == 0
    assert found.when_wrong is None
    assert found.ranking is None
