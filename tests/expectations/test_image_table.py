from collections.abc import Hashable
from typing import Any

import numpy as np
import pytest

from expectations.image_table import TURNS, image_table
from mnist_cnn.digits import Digits

Splits = tuple[Digits, Digits]


def drawn(*slices: tuple[slice, slice]) -> np.ndarray:
    """Return one black image with white rectangles."""
    image = np.zeros((1, 28, 28), np.uint8)
    for rows, columns in slices:
        image[0, rows, columns] = 255
    return image


def row(image: np.ndarray, label: int = 1) -> dict[Hashable, Any]:
    return image_table(image, np.array([label])).iloc[0].to_dict()


def test_one_row_an_image_in_the_given_order(sample: Splits) -> None:
    training, _ = sample

    table = image_table(training.images, training.labels)

    assert table["label"].tolist() == training.labels.tolist()
    assert np.allclose(table["mean"], training.images.mean((1, 2)))
    assert np.allclose(table["contrast"], training.images.std((1, 2)), atol=1e-3)
    assert np.allclose(table["ink"], (training.images >= 128).mean((1, 2)))
    assert not table.isna().any(axis=None)


def test_a_row_does_not_depend_on_the_images_measured_with_it(sample: Splits) -> None:
    images, labels = (np.concatenate([x] * 4) for x in (sample[0].images, sample[0].labels))
    assert len(images) > 4096  # more than one chunk

    whole = image_table(images, labels).drop(columns="label_agrees")  # which is about all of them
    alone = image_table(images[5000:5001], labels[5000:5001]).drop(columns="label_agrees")

    assert whole.iloc[5000]["digest"] == alone.iloc[0]["digest"]
    assert np.allclose(
        whole.iloc[5000].to_numpy(float), alone.iloc[0].to_numpy(float), rtol=1e-4, atol=1e-4
    )


def test_an_upright_bar_has_its_width_and_place_and_no_slant() -> None:
    bar = row(drawn((slice(4, 24), slice(15, 18))))

    # An upright outline crosses 4/pi fewer pixel edges than the average direction does.
    assert bar["stroke_width"] == pytest.approx(3 * 4 / np.pi * 20 / 23)
    assert (bar["centre_x"], bar["centre_y"]) == pytest.approx((16, 13.5))
    assert bar["slant"] == pytest.approx(0, abs=1e-6)
    assert bar["border"] == 0


def test_a_bar_that_leans_right_has_a_positive_slant() -> None:
    leaning = np.zeros((1, 28, 28), np.uint8)
    for y in range(4, 24):
        leaning[0, y, 24 - y : 27 - y] = 255  # further left, further down

    assert row(leaning)["slant"] == pytest.approx(1, abs=1e-3)
    assert row(leaning[:, :, ::-1])["slant"] == pytest.approx(-1, abs=1e-3)


def test_an_inverted_image_has_a_bright_border_and_a_darker_centre() -> None:
    inverted = row(255 - drawn((slice(4, 24), slice(13, 16))))

    assert inverted["border"] == 255
    assert inverted["centre_over_border"] < 0


@pytest.mark.parametrize(("level", "blank"), [(0, True), (7, False), (255, False)])
def test_an_image_of_one_value_is_constant_and_blank_if_it_is_black(
    level: int,
    *,
    blank: bool,
) -> None:
    image = row(np.full((1, 28, 28), level, np.uint8))

    assert image["constant"]
    assert image["blank"] == blank


def test_a_mirrored_seven_resembles_a_mirrored_seven_more(mnist: Splits) -> None:
    training, _ = mnist
    sevens = training.images[training.labels == 7]
    labels = np.full(len(sevens), 7)

    upright = image_table(sevens, labels)["upright_over_mirrored"]
    mirrored = image_table(sevens[:, :, ::-1], labels)["upright_over_mirrored"]

    assert upright.mean() == pytest.approx(0.178, abs=0.005)
    assert np.allclose(upright, -mirrored, atol=1e-5)


def test_a_label_that_is_no_digit_has_no_likeness() -> None:
    image = drawn((slice(4, 24), slice(13, 16)))

    assert np.isnan(row(image, label=10)["upright_over_mirrored"])
    assert not row(image, label=10)["label_match"]
    assert row(image, label=1)["label_match"]


def test_one_changed_pixel_changes_the_digest_and_not_the_near_digest() -> None:
    image = drawn((slice(4, 24), slice(13, 16)))
    touched = image.copy()
    touched[0, 10, 14] = 254

    assert row(image)["digest"] != row(touched)["digest"]
    assert row(image)["near_digest"] == row(touched)["near_digest"]


def test_the_digest_tells_sizes_apart() -> None:
    flat = np.zeros((1, 14, 56), np.uint8)

    assert row(flat)["digest"] != row(flat.reshape(1, 28, 28))["digest"]


def test_dimming_keeps_nearly_every_near_digest(sample: Splits) -> None:
    training, _ = sample
    dimmed = np.rint(training.images * 0.9).astype(np.uint8)

    before, after = (image_table(x, training.labels) for x in (training.images, dimmed))

    assert (before["near_digest"] == after["near_digest"]).mean() > 0.9
    assert not (before["digest"] == after["digest"]).any()


def test_different_honest_images_rarely_share_a_near_digest(mnist: Splits) -> None:
    training, _ = mnist
    table = image_table(training.images, training.labels)
    early, late = table[:50_000], table[50_000:]

    assert late["near_digest"].isin(early["near_digest"]).mean() == pytest.approx(0.0094, abs=1e-4)
    assert not table["digest"].duplicated().any()


def test_noise_is_a_longer_stroke_than_any_digit(sample: Splits) -> None:
    digits = image_table(sample[0].images, sample[0].labels)["stroke_length"]
    noise = np.random.default_rng(0).integers(0, 256, (100, 28, 28), np.uint8)

    assert digits.max() < 50
    assert image_table(noise, np.zeros(100, int))["stroke_length"].min() > 250


def test_the_least_of_the_seven_likenesses_has_a_column(sample: Splits) -> None:
    table = image_table(sample[0].images, sample[0].labels)
    turns = table[[f"upright_over_{name}" for name in TURNS]]

    assert np.array_equal(table["upright_over_any"], turns.min(axis=1))


@pytest.mark.parametrize("shape", [(1, 5), (60, 60), (0, 0), (27, 29)])
def test_any_size_is_measured_and_recorded(shape: tuple[int, int]) -> None:
    table = image_table(np.full((2, *shape), 200, np.uint8), np.array([1, 2]))

    assert table[["height", "width"]].to_numpy().tolist() == [list(shape)] * 2


def test_no_images_make_a_table_without_rows() -> None:
    table = image_table(np.zeros((0, 28, 28), np.uint8), np.zeros(0, np.int64))

    assert len(table) == 0
    assert {"label", "digest", "upright_over_mirrored"} <= set(table.columns)


@pytest.mark.parametrize(
    ("images", "labels", "sentence"),
    [
        (np.zeros((3, 28, 28)), np.zeros(3, int), r"images are float64 .* expected uint8"),
        (np.zeros((3, 784), np.uint8), np.zeros(3, int), r"shape \(3, 784\); expected uint8"),
        (np.zeros((3, 28, 28), np.uint8), np.zeros(2, int), r"shape \(2,\); .* the 3 images"),
        (np.zeros((3, 28, 28), np.uint8), np.zeros(3), r"labels are float64"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_with_a_sentence(
    images: np.ndarray, labels: np.ndarray, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        image_table(images, labels)
