import json
import socket
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest

from expectations.image_table import image_table
from expectations.validation import ValidationReport, validate
from mnist_cnn.digits import Digits

Splits = tuple[Digits, Digits]

Faulty = tuple[np.ndarray, np.ndarray]
RNG = np.random.default_rng(0)


def judged(training: Faulty, test: Faulty) -> ValidationReport:
    return validate(image_table(*training), image_table(*test))


def some(images: np.ndarray, share: float) -> np.ndarray:
    rows: np.ndarray = np.arange(len(images)) % round(1 / share) == 0
    return rows


def changed(
    change: Callable[[np.ndarray], np.ndarray], share: float = 1.0
) -> Callable[..., Faulty]:
    """Plant a fault in a share of the images."""

    def plant(images: np.ndarray, labels: np.ndarray) -> Faulty:
        rows = some(images, share)[:, None, None]
        return np.where(rows, change(images), images).astype(np.uint8), labels

    return plant


def relabelled(change: Callable[[np.ndarray], np.ndarray]) -> Callable[..., Faulty]:
    return lambda images, labels: (images, change(labels))


def noise(images: np.ndarray) -> np.ndarray:
    return RNG.integers(0, 256, images.shape)


def framed_noise(images: np.ndarray) -> np.ndarray:
    pixels = noise(images)
    pixels[:, :4] = pixels[:, -4:] = pixels[:, :, :4] = pixels[:, :, -4:] = 0
    return pixels


def shuffled(labels: np.ndarray, share: float) -> np.ndarray:
    rows = np.flatnonzero(RNG.random(len(labels)) < share)
    labels = labels.copy()
    labels[rows] = RNG.permutation(labels[rows])
    return labels


FAULTS: dict[str, tuple[Callable[[np.ndarray, np.ndarray], Faulty], str, str | None]] = {
    "inverted": (changed(lambda x: 255 - x), "between", "border"),
    "2 % inverted": (changed(lambda x: 255 - x, 0.02), "between", "centre_over_border"),
    "blank": (changed(lambda x: x * 0), "in_set", "blank"),
    "one blank": (changed(lambda x: x * 0, 0.001), "in_set", "blank"),
    "constant": (changed(lambda x: x * 0 + 7, 0.001), "in_set", "constant"),
    "scaled to 0-1": (changed(lambda x: x // 255), "between", "maximum"),
    "shifted by 40": (changed(lambda x: np.minimum(x.astype(int) + 40, 255)), "between", "minimum"),
    "noise only": (changed(noise), "between", "border"),
    "noise in a frame, a label match": (changed(framed_noise), "in_set", "label_match"),
    "noise in a frame, a stroke": (changed(framed_noise), "mean_to_be_between", "stroke_width"),
    "all ink": (changed(lambda x: np.pad(x[:, 8:20, 8:20] * 0 + 255, ((0, 0), (8, 8), (8, 8)))),
                "unique", "digest"),
    "a dot": (changed(lambda x: x * (np.arange(784) == 406).reshape(28, 28) * 0
                      + 255 * (np.arange(784) == 406).reshape(28, 28)), "between", "ink"),
    "filled in": (changed(lambda x: np.where(np.maximum.reduce(
        [np.roll(x, (i, j), (1, 2)) for i in range(-3, 4) for j in range(-3, 4)]) > 0, 255, 0)),
        "mean_to_be_between", "ink"),
    "swapped axes": (changed(lambda x: x.transpose(0, 2, 1)), "mean", "upright_over_transposed"),
    "rotated by 90": (changed(lambda x: np.rot90(x, 1, (1, 2))), "mean", "upright_over_rotated_90"),
    "rotated by 270": (changed(lambda x: np.rot90(x, 3, (1, 2))), "mean",
                       "upright_over_rotated_270"),
    "rotated by 180": (changed(lambda x: x[:, ::-1, ::-1]), "mean", "upright_over_rotated_180"),
    "mirrored": (changed(lambda x: x[:, :, ::-1]), "mean", "upright_over_mirrored"),
    "upside down": (changed(lambda x: x[:, ::-1]), "mean", "upright_over_flipped"),
    "anti-transposed": (changed(lambda x: x.transpose(0, 2, 1)[:, ::-1, ::-1]), "mean",
                        "upright_over_anti_transposed"),
    "moved right": (changed(lambda x: np.roll(x, 4, 2)), "mean", "centre_x"),
    "moved up": (changed(lambda x: np.roll(x, -4, 1)), "mean", "centre_y"),
    "label 10": (relabelled(lambda y: np.where(np.arange(len(y)) == 3, 10, y)), "between", "label"),
    "label -1": (relabelled(lambda y: np.where(np.arange(len(y)) == 3, -1, y)), "between", "label"),
    "one class only": (relabelled(lambda y: y * 0 + 7), "unique_value_count", "label"),
    "nearly one class": (relabelled(lambda y: np.where(np.arange(len(y)) % 9 > 0, 1, y)),
                         "kl_divergence", "label"),
    "shuffled labels": (relabelled(lambda y: shuffled(y, 1.0)), "in_set", "label_agrees"),
    "half the labels shuffled": (relabelled(lambda y: shuffled(y, 0.5)), "in_set", "label_agrees"),
    "labels shifted by one": (relabelled(lambda y: (y + 1) % 10), "in_set", "label_match"),
    "another height": (lambda x, y: (x[:, :-1], y), "in_set", "height"),
    "another width": (lambda x, y: (np.pad(x, ((0, 0), (0, 0), (2, 2))), y), "in_set", "width"),
    "too few": (lambda x, y: (x[:500], y[:500]), "row_count", None),
    "none": (lambda x, y: (x[:0], y[:0]), "row_count", None),
    "everything twice": (lambda x, y: (np.tile(x, (2, 1, 1)), np.tile(y, 2)), "unique", "digest"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_refused_with_expectation_observed_and_bound(
    sample: Splits, fault: str
) -> None:
    plant, expectation, column = FAULTS[fault]
    training, test = sample

    report = judged(plant(training.images, training.labels), (test.images, test.labels))

    caught = [f for f in report.critical if expectation in f.expectation and f.column == column]
    assert caught, [finding.sentence for finding in report.critical]
    sentence = caught[0].sentence
    assert sentence.startswith(
        f"training images: {caught[0].expectation}({column or ''}): observed"
    )
    assert caught[0].observed in sentence
    assert sentence.endswith(f"expected {caught[0].expected}")
    assert all(finding.suite == "training images" for finding in report.critical)


def test_honest_data_pass_without_a_failure(honest: Splits) -> None:
    report = judged(*((split.images, split.labels) for split in honest))

    assert [f.sentence for f in report.findings if not f.success] == []
    assert {f.suite for f in report.findings} == {"training images", "test images"}


def test_the_sentence_reads_as_one() -> None:
    images = RNG.integers(0, 2, (1000, 28, 28)).astype(np.uint8)
    labels = np.arange(1000) % 10
    labels[:3] = 10, 11, 10

    report = judged((images, labels), (images, labels))

    sentences = [finding.sentence for finding in report.critical]
    assert (
        "training images: expect_column_values_to_be_between(label): "
        "observed 3 of 1000 outside (10, 11), expected 0 to 9"
    ) in sentences
    assert (
        "test images: expect_column_values_to_be_between(maximum): "
        "observed 1000 of 1000 outside (1), expected 128 to 255 in at least 99%"
    ) in sentences


def test_the_test_split_is_judged_too(sample: Splits) -> None:
    training, test = sample

    report = judged((training.images, training.labels), (255 - test.images, test.labels))

    assert {finding.suite for finding in report.critical} == {"test images"}


def test_one_test_image_in_training_is_refused(sample: Splits) -> None:
    training, test = sample
    images = np.concatenate([training.images, test.images[7:8]])
    labels = np.append(training.labels, test.labels[7])

    report = judged((images, labels), (test.images, test.labels))

    assert [f.sentence for f in report.critical] == [
        (
            "training images: expect_column_values_to_be_in_set(in_test): "
            "observed 1 of 1439 outside (True), expected False"
        )
    ]
    assert report.critical[0].rows == (1438,)


def test_dimmed_test_images_in_training_are_refused_as_nearly_the_same(sample: Splits) -> None:
    training, test = sample
    dimmed = np.rint(test.images * 0.9).astype(np.uint8)
    images = np.concatenate([training.images, dimmed])
    labels = np.append(training.labels, test.labels)

    report = judged((images, labels), (test.images, test.labels))

    assert {f.column for f in report.critical} == {"near_test"}


def test_one_duplicate_is_a_warning_and_not_a_refusal(sample: Splits) -> None:
    training, test = sample
    images = np.concatenate([training.images, training.images[:1]])
    labels = np.append(training.labels, training.labels[0])

    report = judged((images, labels), (test.images, test.labels))

    assert report.critical == ()
    assert [f.sentence for f in report.warnings] == [
        (
            "training images: expect_column_values_to_be_unique(digest): "
            "observed 2 of 1439 repeated, expected no value twice"
        )
    ]


def test_an_expectation_that_cannot_be_evaluated_refuses(sample: Splits) -> None:
    training, test = (image_table(split.images, split.labels) for split in sample)

    report = validate(training.drop(columns="slant"), test)  # its expectation only warns

    assert [f.column for f in report.critical] == ["slant"]
    assert 'The column "slant" in BatchData does not exist' in report.critical[0].sentence


def test_the_tables_are_not_changed(sample: Splits) -> None:
    tables = [image_table(split.images, split.labels) for split in sample]
    copies = [table.copy() for table in tables]

    validate(*tables)

    assert all(table.equals(copy) for table, copy in zip(tables, copies, strict=True))


def test_a_report_survives_json_even_where_nothing_was_finite(sample: Splits) -> None:
    training, test = sample
    labels = np.full_like(training.labels, 77)  # infinite divergence, means of nothing

    report = judged((training.images, labels), (test.images, test.labels))

    text = report.model_dump_json()
    assert ValidationReport.model_validate_json(text) == report
    json.dumps(report.raw, allow_nan=False)


def test_validation_asks_no_network_and_prints_nothing(
    sample: Splits, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: object) -> None:
        raise AssertionError("validation opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refused)
    judged(*((split.images, split.labels) for split in sample))

    assert capfd.readouterr() == ("", "")


def test_importing_the_room_loads_neither_great_expectations_nor_pandas() -> None:
    script = (
        "import sys, expectations.validation, expectations.report_page, expectations.image_table;"
        "print(sorted({'great_expectations', 'pandas'} & set(sys.modules)))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, check=True, text=True
    )
    assert answer.stdout.strip() == "[]"
