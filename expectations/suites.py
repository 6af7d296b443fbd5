"""Great Expectations suites for images, applied before anything is trained on them.

A failed `critical` expectation refuses the data; a failed `warning` is reported. The comment at a
bound gives the value of honest data: M is MNIST's training split, S the training part of the
embedded sample of 1,797 digits. Columns are those of `expectations.image_table`, and those that
`expectations.validation` joins to it.
"""

from collections.abc import Iterable

from great_expectations import ExpectationSuite
from great_expectations import expectations as gxe
from great_expectations.expectations.metadata_types import FailureSeverity

from expectations.image_table import TURNS
from expectations.reference import ANOTHER_POPULATION, WORTH_A_LOOK
from mnist_cnn.digits import CLASSES, SIDE

CRITICAL = FailureSeverity.CRITICAL
WARNING = FailureSeverity.WARNING

FEWEST_ARRIVING = 100
"""Least size of a batch whose orientation and labels can be judged."""

MOST = 0.99
"""Share of images that must keep a bound on single images, where not all of them must."""


def training_images() -> ExpectationSuite:
    """Return the suite for the training split, joined with `in_test` and `near_test`."""
    expectations = [
        *_size(at_least=1_000),  # M 60,000; S 1,438
        *_each_image(),
        *_whole_split(),
        *_unseen_in("test"),
    ]
    return ExpectationSuite(name="training images", expectations=expectations)


def test_images() -> ExpectationSuite:
    """Return the suite for the test split."""
    expectations = [
        *_size(at_least=300),  # of MNIST 10,000, of the sample 359
        *_each_image(),
        *_whole_split(),
    ]
    return ExpectationSuite(name="test images", expectations=expectations)


def arriving_images(images: int, *, with_champion: bool) -> ExpectationSuite:
    """Return the suite for an arriving batch of `images` images.

    `with_champion` adds the expectations on the column `champion_contradicts`. A batch of fewer
    than `FEWEST_ARRIVING` images fails the expectation on its size; those on the batch as a whole
    are left out.
    """
    together = [*_whole_split(), *(_plausible_labels() if with_champion else ())]
    expectations = [
        *_size(FEWEST_ARRIVING),
        *_each_image(),
        *_new(),
        *_unseen_in("holdout"),
        *(together if images >= FEWEST_ARRIVING else ()),
    ]
    return ExpectationSuite(name="arriving images", expectations=expectations)


def arriving_distribution(features: Iterable[str]) -> ExpectationSuite:
    """Return the suite for the population stability indices of `expectations.reference`.

    Of 200 random batches of 500 to 5,000 MNIST images none reached 0.05 in any feature, which is
    half the bound that warns.
    """
    expectations = [
        gxe.ExpectColumnMaxToBeBetween(
            column=f"psi_{feature}",
            max_value=bound,
            severity=severity,
            description=f"The {feature.replace('_', ' ')} is distributed as in accepted images.",
        )
        for feature in features
        for bound, severity in ((WORTH_A_LOOK, WARNING), (ANOTHER_POPULATION, CRITICAL))
    ]
    return ExpectationSuite(name="arriving distribution", expectations=expectations)


def _size(at_least: int) -> list[gxe.Expectation]:
    return [
        gxe.ExpectTableRowCountToBeBetween(
            min_value=at_least,
            max_value=10_000_000,
            severity=CRITICAL,
            description="There are enough images to judge, and not absurdly many.",
        )
    ]


def _each_image() -> list[gxe.Expectation]:
    """Return the expectations on single images, which apply to a batch of one as well."""
    return [
        gxe.ExpectColumnValuesToBeInSet(
            column="height",
            value_set=[SIDE],
            severity=CRITICAL,
            description=f"Every image is {SIDE} pixels high.",
        ),
        gxe.ExpectColumnValuesToBeInSet(
            column="width",
            value_set=[SIDE],
            severity=CRITICAL,
            description=f"Every image is {SIDE} pixels wide.",
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="label",
            min_value=0,
            max_value=CLASSES - 1,
            severity=CRITICAL,
            description="Every label is a digit.",
        ),
        gxe.ExpectColumnValuesToBeInSet(
            column="blank",
            value_set=[False],
            severity=CRITICAL,  # M 0, S 0
            description="No image is empty.",
        ),
        gxe.ExpectColumnValuesToBeInSet(
            column="constant",
            value_set=[False],
            severity=CRITICAL,  # M 0, S 0
            description="No image has one value everywhere.",
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="minimum",
            min_value=0,
            max_value=32,  # M 0 and S 0 in every image
            mostly=MOST,
            severity=CRITICAL,
            description="The background is dark: values are not shifted.",
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="maximum",
            min_value=128,  # M 254 and S 214 at least
            max_value=255,
            mostly=MOST,
            severity=CRITICAL,
            description="The ink is bright: values are 0-255, not 0-1.",
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="border",
            min_value=0,
            max_value=32,  # M 8.6 and S 0 at most
            mostly=MOST,
            severity=CRITICAL,
            description="The border is background: no image is inverted or all noise.",
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="centre_over_border",
            min_value=8,  # M 17.5 and S 67.0 at least
            mostly=MOST,
            severity=CRITICAL,
            description="The middle is brighter than the border: no image is inverted.",
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="ink",
            min_value=0.01,  # M 0.019 and S 0.087 at least
            max_value=0.45,  # M 0.398 and S 0.219 at most
            mostly=MOST,
            severity=CRITICAL,
            description="Ink covers as much of an image as a digit does.",
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="stroke_length",
            min_value=5,  # M 13.4 and S 18.8 at least
            max_value=100,  # M 77.8 and S 45.6 at most; noise in a frame 148, over all 275 at least
            mostly=MOST,
            severity=CRITICAL,
            description="The ink is as long as a pen's stroke: no image is specks or noise.",
        ),
        gxe.ExpectColumnValuesToBeUnique(
            column="digest",
            mostly=MOST,
            severity=CRITICAL,  # M 0 and S 0 duplicates
            description="At most 1 % of the images occur twice.",
        ),
        gxe.ExpectColumnValuesToBeUnique(
            column="digest",
            severity=WARNING,
            description="No image occurs twice.",
        ),
    ]


def _whole_split() -> list[gxe.Expectation]:
    """Return the expectations on some hundred images of all ten digits together."""
    # A few images may look better turned; the mean over many shows a turned data set.
    upright = [
        gxe.ExpectColumnMeanToBeBetween(
            column=f"upright_over_{turn}",
            min_value=0.01,  # M 0.125 (mirrored) to 0.348; S 0.028 (flipped) to 0.332
            severity=CRITICAL,
            description=f"Images resemble their digit better than the digit {turn}.",
        )
        for turn in TURNS
    ]
    # The mean hides a turned minority, so the share of such images is bounded as well.
    turned = [
        gxe.ExpectColumnValuesToBeBetween(
            column="upright_over_any",
            min_value=-0.2,
            mostly=mostly,  # M 0.992; S 0.989
            severity=severity,
            description="Hardly any image is much more like its digit turned or mirrored.",
        )
        for mostly, severity in ((0.98, WARNING), (0.95, CRITICAL))
    ]
    return [
        gxe.ExpectColumnUniqueValueCountToBeBetween(
            column="label",
            min_value=CLASSES,
            severity=CRITICAL,
            description="All ten digits occur.",
        ),
        _even_labels(0.05, WARNING),  # M 0.0014; S 0.0025
        _even_labels(0.2, CRITICAL),
        gxe.ExpectColumnMeanToBeBetween(
            column="ink",
            min_value=0.06,  # M 0.132; S 0.157
            max_value=0.28,
            severity=CRITICAL,
            description="Ink covers as much as in handwritten digits, on average.",
        ),
        gxe.ExpectColumnMeanToBeBetween(
            column="stroke_width",
            min_value=1.5,  # M 2.58; S 3.84; noise 1.3
            max_value=6,
            severity=CRITICAL,
            description="Strokes are as wide as a pen's, on average.",
        ),
        gxe.ExpectColumnMeanToBeBetween(
            column="slant",
            min_value=-0.15,  # M 0.11; S -0.04
            max_value=0.3,
            severity=WARNING,
            description="Digits lean as handwriting does, on average.",
        ),
        gxe.ExpectColumnMeanToBeBetween(
            column="centre_x",
            min_value=11,  # M 14.0; S 13.7
            max_value=16,
            severity=CRITICAL,
            description="Digits stand in the middle, left to right, on average.",
        ),
        gxe.ExpectColumnMeanToBeBetween(
            column="centre_y",
            min_value=11,  # M 14.0; S 13.5
            max_value=16,
            severity=CRITICAL,
            description="Digits stand in the middle, top to bottom, on average.",
        ),
        *upright,
        *turned,
        gxe.ExpectColumnValuesToBeInSet(
            column="label_match",
            value_set=[True],
            mostly=0.3,  # M 0.78; S 0.43, its digits being fatter; chance 0.10
            severity=CRITICAL,
            description="Images resemble the mean MNIST digit of their label.",
        ),
        gxe.ExpectColumnValuesToBeInSet(
            column="label_agrees",
            value_set=[True],
            mostly=0.65,  # M 0.78; S 0.87; with 30 % of the labels shuffled 0.57 and 0.63
            severity=CRITICAL,
            description="Images of one label resemble each other more than those of another.",
        ),
    ]


def _even_labels(threshold: float, severity: FailureSeverity) -> gxe.Expectation:
    even = {"values": list(range(CLASSES)), "weights": [1 / CLASSES] * CLASSES}
    return gxe.ExpectColumnKLDivergenceToBeLessThan(
        column="label",
        partition_object=even,
        threshold=threshold,
        severity=severity,
        description="The ten digits occur about equally often.",
    )


def _unseen_in(split: str) -> list[gxe.Expectation]:
    """Return the expectations against leakage, on the columns `in_SPLIT` and `near_SPLIT`.

    `in_SPLIT` marks images whose pixels recur in that split, `near_SPLIT` those whose coarse
    pattern does.
    """
    return [
        gxe.ExpectColumnValuesToBeInSet(
            column=f"in_{split}",
            value_set=[False],
            severity=CRITICAL,  # M 0, S 0
            description=f"No image recurs in the {split} split.",
        ),
        gxe.ExpectColumnValuesToBeInSet(
            column=f"near_{split}",
            value_set=[False],
            mostly=0.99,  # M 0.991, the last sixth against the others; S 1.0
            severity=WARNING,
            description=f"Hardly any image nearly recurs in the {split} split.",
        ),
        gxe.ExpectColumnValuesToBeInSet(
            column=f"near_{split}",
            value_set=[False],
            mostly=0.95,
            severity=CRITICAL,
            description=f"At most 5 % of the images nearly recur in the {split} split.",
        ),
    ]


def _new() -> list[gxe.Expectation]:
    """Return the expectations against a batch that is sent twice, on the column `in_accepted`."""
    return [
        gxe.ExpectColumnValuesToBeInSet(
            column="in_accepted",
            value_set=[False],
            severity=WARNING,  # M 0: no two of its images are the same
            description="No image was accepted before.",
        ),
        gxe.ExpectColumnValuesToBeInSet(
            column="in_accepted",
            value_set=[False],
            mostly=MOST,
            severity=CRITICAL,
            description="At most 1 % of the images were accepted before.",
        ),
    ]


def _plausible_labels() -> list[gxe.Expectation]:
    """Return the expectations against wrong labels, on the column `champion_contradicts`.

    The bounds are for a champion that classifies 99 of 100 images correctly.
    """
    return [
        gxe.ExpectColumnValuesToBeInSet(
            column="champion_contradicts",
            value_set=[False],
            mostly=mostly,
            severity=severity,
            description="The champion is rarely sure of another label.",
        )
        for mostly, severity in ((0.98, WARNING), (0.95, CRITICAL))
    ]
