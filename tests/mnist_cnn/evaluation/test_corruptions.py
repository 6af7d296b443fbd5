from dataclasses import replace

import numpy as np
import pytest
import torch

from mnist_cnn.digits import SIDE, Digits
from mnist_cnn.evaluation.corruptions import BATCH, CORRUPTIONS, Corruption, condition, corrupted
from mnist_cnn.styles import measure_styles

Splits = tuple[Digits, Digits]

BY_NAME = {corruption.name: corruption for corruption in CORRUPTIONS}
EVERY = [(c, strength) for c in CORRUPTIONS for strength in c.strengths]


def spoil(images: np.ndarray, name: str, strength: float, seed: int = 0) -> np.ndarray:
    batches = corrupted(torch.tensor(images), BY_NAME[name], strength, seed)
    return torch.cat(list(batches)).numpy()


@pytest.mark.parametrize(("corruption", "strength"), EVERY, ids=lambda v: getattr(v, "name", v))
def test_every_corruption_changes_the_images_the_same_way_twice(
    corruption: Corruption, strength: float, splits: Splits
) -> None:
    images = torch.tensor(splits[1].images[:40])
    once, again = (torch.cat(list(corrupted(images, corruption, strength))) for _ in range(2))
    assert once.dtype == torch.uint8
    assert once.shape == images.shape
    assert torch.equal(once, again)
    assert (once != images).flatten(1).any(1).float().mean() > 0.7  # a small patch may miss the ink


def test_conditions_have_distinct_names() -> None:
    names = [condition(corruption, strength) for corruption, strength in EVERY]
    assert len(set(names)) == len(names)
    assert "slant=-15" in names


def test_every_factor_that_is_corrupted_has_corruptions() -> None:
    factors = {corruption.factor for corruption in CORRUPTIONS}
    assert factors == {"handwriting style", "noise level", "image quality"}
    assert all(len(c.strengths) == 3 for c in CORRUPTIONS if c.factor == "noise level")


@pytest.mark.parametrize("name", ["Gaussian noise", "elastic style", "occlusion", "shot noise"])
def test_another_seed_draws_other_noise(name: str, splits: Splits) -> None:
    images, strength = splits[1].images[:20], BY_NAME[name].strengths[-1]
    assert (spoil(images, name, strength, 0) != spoil(images, name, strength, 1)).any()


def test_noise_does_not_repeat_from_batch_to_batch() -> None:
    grey = np.full((2 * BATCH, SIDE, SIDE), 128, np.uint8)
    noisy = spoil(grey, "Gaussian noise", 0.18)
    assert (noisy[:BATCH] != noisy[BATCH:]).any((1, 2)).all()


def test_noise_has_the_strength_that_it_states() -> None:
    grey = np.full((200, SIDE, SIDE), 128, np.uint8)
    assert spoil(grey, "Gaussian noise", 0.08).std() / 255 == pytest.approx(0.08, rel=0.02)
    hit = spoil(grey, "impulse noise", 0.27) != 128
    assert hit.mean() == pytest.approx(0.27, rel=0.03)
    photons = spoil(grey, "shot noise", 60) / 255
    assert photons.std() == pytest.approx(np.sqrt(128 / 255 / 60), rel=0.03)


def test_the_elastic_displacement_has_the_size_that_it_states() -> None:
    # A ramp turns a sideways displacement into a change of grey: here 4 grey levels a pixel.
    ramp = np.broadcast_to(np.arange(SIDE) * 4 + 60, (500, SIDE, SIDE)).astype(np.uint8)
    moved = spoil(ramp, "elastic style", 1.5).astype(float) - ramp
    inside = moved[:, 8:-8, 8:-8] / 4
    assert np.sqrt((inside**2).mean()) == pytest.approx(1.5, rel=0.1)


def test_slant_leans_to_the_right_by_its_degrees(splits: Splits) -> None:
    images = splits[1].images
    before = measure_styles(images)["slant"]
    after = measure_styles(spoil(images, "slant", 15))["slant"]
    assert np.median(after - before) == pytest.approx(15, abs=3)


def test_thin_strokes_are_thinner_and_thick_ones_thicker(splits: Splits) -> None:
    images = splits[1].images
    widths = [
        np.nanmedian(measure_styles(part)["stroke width"])
        for part in (
            spoil(images, "thin stroke", 0.75),
            spoil(images, "thin stroke", 0.25),
            images,
            spoil(images, "thick stroke", 1),
            spoil(images, "thick stroke", 2),
        )
    ]
    assert widths == sorted(widths)
    assert widths[0] < widths[2] < widths[-1]


def test_blur_keeps_the_ink(splits: Splits) -> None:
    images = splits[1].images
    assert spoil(images, "blur", 1).mean() == pytest.approx(images.mean(), rel=0.02)


def test_occlusion_hides_a_square_of_its_size() -> None:
    white = np.full((50, SIDE, SIDE), 255, np.uint8)
    hidden = (spoil(white, "occlusion", 8) == 0).sum((1, 2))
    assert (hidden == 64).all()


def test_brightness_is_clipped_and_does_not_wrap() -> None:
    white = np.full((3, SIDE, SIDE), 250, np.uint8)
    assert (spoil(white, "brightness", 0.5) == 255).all()


def test_a_corruption_is_defined_once_and_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        CORRUPTIONS[0].name = "other"  # type: ignore[misc]
    assert replace(CORRUPTIONS[0], name="other").name == "other"


def test_scale_keeps_the_digits_in_the_middle(splits: Splits) -> None:
    digits: Digits = splits[1]
    small = spoil(digits.images, "scale", 0.5).astype(float)
    place = np.arange(SIDE) - (SIDE - 1) / 2
    assert np.abs(np.median(small.sum(1) @ place / small.sum((1, 2)))) < 1
