import io

import numpy as np
import pytest
from matplotlib.image import imread
from torch import nn

from mnist_cnn.digits import Digits
from mnist_cnn.evaluation import Evaluation, Outcomes, evaluate, plots

Splits = tuple[Digits, Digits]


def pixels(png: bytes) -> np.ndarray:
    assert png.startswith(b"\x89PNG")
    return imread(io.BytesIO(png))


@pytest.fixture(scope="module")
def evaluations(splits: Splits, outcomes: dict[str, Outcomes]) -> dict[str, Evaluation]:
    return {
        name: evaluate(found, splits[1], model=name, snapshot="s", outcomes="o")
        for name, found in outcomes.items()
    }


@pytest.fixture(scope="module")
def pictures(
    splits: Splits,
    outcomes: dict[str, Outcomes],
    evaluations: dict[str, Evaluation],
    reader: nn.Module,
) -> dict[str, bytes]:
    pair = evaluations["candidate"], evaluations["champion"]
    return {
        "confusion": plots.plot_confusion(pair[0]),
        "factors": plots.plot_factors(*pair),
        "slices": plots.plot_slices(*pair),
        "reliability": plots.plot_reliability(*pair),
        "errors": plots.plot_errors(outcomes["candidate"], splits[1]),
        "corruptions": plots.plot_corruptions(splits[1]),
        "examination": plots.plot_examination(reader, outcomes["candidate"], splits[1]),
    }


def test_every_picture_is_opaque_and_light_so_that_it_reads_on_any_page(
    pictures: dict[str, bytes],
) -> None:
    for name, png in pictures.items():
        image = pixels(png)
        assert (image[..., 3] == 1).all(), name
        assert (image[0, :, :3] > 0.95).all(), name
        assert image[..., :3].min() < 0.2, name  # dark text


def test_nothing_is_cut_off_at_the_edges(pictures: dict[str, bytes]) -> None:
    for name, png in pictures.items():
        image = pixels(png)[..., :3]
        for edge in (image[0], image[-1], image[:, 0], image[:, -1]):
            assert (edge > 0.9).all(), name


def test_the_same_evaluation_gives_the_same_picture(
    pictures: dict[str, bytes], evaluations: dict[str, Evaluation]
) -> None:
    assert plots.plot_confusion(evaluations["candidate"]) == pictures["confusion"]


def test_the_champion_is_drawn_beside_the_candidate(evaluations: dict[str, Evaluation]) -> None:
    orange = np.array([0xD9, 0x70, 0x0A]) / 255

    def has_orange(png: bytes) -> bool:
        return bool((np.abs(pixels(png)[..., :3] - orange).max(-1) < 0.01).any())

    pair = evaluations["candidate"], evaluations["champion"]
    assert has_orange(plots.plot_slices(*pair))
    assert not has_orange(plots.plot_slices(pair[0]))


def test_a_perfect_model_has_pictures_too(splits: Splits) -> None:
    digits = Digits(splits[1].images[:50], splits[1].labels[:50])
    sure = np.eye(10, dtype=np.float32)[digits.labels]
    found = Outcomes(sure, {})
    perfect = evaluate(found, digits, model="m", snapshot="s", outcomes="o")
    for png in (
        plots.plot_confusion(perfect),
        plots.plot_factors(perfect),
        plots.plot_reliability(perfect),
        plots.plot_errors(found, digits),
    ):
        assert pixels(png).size
