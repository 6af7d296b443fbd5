from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import maximum_filter

from expectations.image_table import image_table
from expectations.reference import (
    FEATURES,
    FeatureProfile,
    ReferenceProfile,
    compare_profiles,
    drift_table,
    reference_profile,
)
from expectations.validation import ValidationReport, validate_batch
from mnist_cnn.digits import Digits

Splits = tuple[Digits, Digits]
Images = np.ndarray
RNG = np.random.default_rng(0)


class Arrivals:
    """Half of a training split is accepted, batches come from the other; the test split is held."""

    def __init__(self, splits: Splits) -> None:
        training, self.test = splits
        half = len(training) // 2
        self.old = training.images[:half], training.labels[:half]
        self.new = training.images[half:], training.labels[half:]
        self.accepted = image_table(*self.old)
        self.holdout = image_table(self.test.images, self.test.labels)

    def judged(self, images: Images, labels: Images, **columns: Images) -> ValidationReport:
        return validate_batch(
            image_table(images, labels).assign(**columns),
            accepted=self.accepted["digest"].to_numpy(),
            holdout=self.holdout,
            reference=reference_profile(self.accepted),
        )


@pytest.fixture(scope="module")
def arrivals(sample: Splits) -> Arrivals:
    return Arrivals(sample)


def columns(report: ValidationReport) -> set[str | None]:
    return {finding.column for finding in report.critical}


def test_an_honest_batch_is_accepted_without_a_warning(honest: Splits) -> None:
    arrivals = Arrivals(honest)
    images, labels = arrivals.new

    report = arrivals.judged(images, labels, champion_contradicts=np.zeros(len(labels), bool))

    assert [finding.sentence for finding in report.findings if not finding.success] == []
    assert report.skipped == ()


def test_random_batches_of_mnist_raise_no_false_alarm(mnist: Splits) -> None:
    arrivals = Arrivals(mnist)
    images, labels = arrivals.new

    for count in (100, 500, 1500, 5000):
        rows = RNG.choice(len(labels), count, replace=False)
        report = arrivals.judged(images[rows], labels[rows])
        assert [finding.sentence for finding in report.critical] == []


def test_the_same_batch_twice_is_refused(arrivals: Arrivals) -> None:
    report = arrivals.judged(*arrivals.old)

    assert "in_accepted" in columns(report)


def test_one_known_image_is_a_warning(arrivals: Arrivals) -> None:
    images, labels = arrivals.new
    report = arrivals.judged(
        np.concatenate([images, arrivals.old[0][:1]]), np.append(labels, arrivals.old[1][0])
    )

    assert report.critical == ()
    assert [finding.column for finding in report.warnings] == ["in_accepted"]


def test_one_holdout_image_is_refused(arrivals: Arrivals) -> None:
    images, labels = arrivals.new
    report = arrivals.judged(
        np.concatenate([images, arrivals.test.images[:1]]),
        np.append(labels, arrivals.test.labels[0]),
    )

    assert columns(report) == {"in_holdout"}
    assert report.critical[0].rows == (len(images),)


def test_dimmed_holdout_images_are_refused(arrivals: Arrivals) -> None:
    dimmed = np.rint(arrivals.test.images[:100] * 0.9).astype(np.uint8)
    images, labels = arrivals.new
    report = arrivals.judged(
        np.concatenate([images, dimmed]), np.append(labels, arrivals.test.labels[:100])
    )

    assert columns(report) == {"near_holdout"}


def test_labels_that_the_champion_contradicts_are_refused(arrivals: Arrivals) -> None:
    images, labels = arrivals.new
    wrong = RNG.random(len(labels)) < 0.1
    planted = np.where(wrong, (labels + 1) % 10, labels)

    report = arrivals.judged(images, planted, champion_contradicts=wrong)

    assert columns(report) == {"champion_contradicts"}
    assert report.critical[0].rows == tuple(np.flatnonzero(wrong)[:20])
    assert f"observed {wrong.sum()} of {len(labels)} outside" in report.critical[0].sentence


def test_thirty_percent_shuffled_labels_are_refused_without_a_champion(mnist: Splits) -> None:
    arrivals = Arrivals(mnist)
    images, labels = (values[:3000] for values in arrivals.new)
    rows = RNG.permutation(3000)[:900]
    planted = labels.copy()
    planted[rows] = RNG.permutation(labels[rows])

    assert "label_agrees" in columns(arrivals.judged(images, planted))


def thickened(images: Images) -> Images:
    thick: Images = maximum_filter(images, (1, 3, 3))
    return thick


def sheared(images: Images) -> Images:
    return np.stack([np.roll(images[:, y], (14 - y) // 3, 1) for y in range(28)], 1)


DRIFTS: dict[str, tuple[Callable[[Images], Images], str]] = {
    "thicker strokes": (thickened, "psi_stroke_width"),
    "more ink": (thickened, "psi_ink"),
    "another slant": (sheared, "psi_slant"),
    "dimmed, the mean": (lambda x: (x * 0.7).astype(np.uint8), "psi_mean"),
    "dimmed, the contrast": (lambda x: (x * 0.7).astype(np.uint8), "psi_contrast"),
}


@pytest.mark.parametrize("drift", DRIFTS)
def test_a_batch_from_another_world_is_refused_for_its_distribution(
    arrivals: Arrivals, drift: str
) -> None:
    change, column = DRIFTS[drift]
    images, labels = arrivals.new

    report = arrivals.judged(change(images), labels)

    sentence = next(f.sentence for f in report.critical if f.column == column)
    assert sentence.startswith("arriving distribution: expect_column_max_to_be_between")
    assert sentence.endswith("expected at most 0.25")


def test_another_mix_of_labels_is_refused_for_its_distribution(arrivals: Arrivals) -> None:
    images, labels = arrivals.new
    kept = (labels > 2) | (np.arange(len(labels)) % 8 == 0)

    assert "psi_label" in columns(arrivals.judged(images[kept], labels[kept]))


def test_one_class_only_is_refused(arrivals: Arrivals) -> None:
    images, labels = arrivals.new
    ones = np.tile(images[labels == 1], (2, 1, 1))

    report = arrivals.judged(ones, np.ones(len(ones), int))

    assert "observed 1, expected at least 10" in " ".join(f.sentence for f in report.critical)


@pytest.mark.parametrize("count", [0, 1, 99])
def test_a_batch_too_small_to_judge_is_refused_for_that_alone(
    arrivals: Arrivals, count: int
) -> None:
    images, labels = (values[:count] for values in arrivals.new)

    report = arrivals.judged(images, labels)

    assert [finding.sentence for finding in report.critical] == [
        (
            "arriving images: expect_table_row_count_to_be_between(): "
            f"observed {count}, expected 100 to 10000000"
        )
    ]
    assert f"there are {count}, expected at least 100" in report.skipped[0]


def test_a_small_batch_is_judged_image_by_image(arrivals: Arrivals) -> None:
    images, labels = (values[:5].copy() for values in arrivals.new)
    images[2] = 0

    assert {None, "blank", "constant"} <= columns(arrivals.judged(images, labels))


def inverted(images: Images) -> Images:
    return 255 - images


def rotated(images: Images) -> Images:
    return np.rot90(images, 1, (1, 2))


def noise(images: Images) -> Images:
    return RNG.integers(0, 256, images.shape, np.uint8)


def framed_noise(images: Images) -> Images:
    return np.pad(noise(images)[:, 4:-4, 4:-4], ((0, 0), (4, 4), (4, 4)))


PARTS: dict[str, tuple[Callable[[Images], Images], str]] = {
    "inverted": (inverted, "border"),
    "rotated by 90": (rotated, "upright_over_any"),
    "rotated by 270": (lambda x: np.rot90(x, 3, (1, 2)), "upright_over_any"),
    "transposed": (lambda x: x.transpose(0, 2, 1), "upright_over_any"),
    "noise": (noise, "border"),
    "noise in a frame": (framed_noise, "stroke_length"),
    "scaled to 0-1": (lambda x: x // 255, "maximum"),
    "scaled to 0-15": (lambda x: x // 17, "maximum"),
    "shifted by 40": (lambda x: np.minimum(x, 215) + 40, "minimum"),
    "blank": (lambda x: x * 0, "blank"),
}


@pytest.mark.parametrize("share", [0.1, 0.3])
@pytest.mark.parametrize("fault", PARTS)
def test_a_batch_of_which_a_part_is_faulty_is_refused(
    arrivals: Arrivals, fault: str, share: float
) -> None:
    change, column = PARTS[fault]
    images, labels = arrivals.new
    rows = np.arange(len(images)) % round(1 / share) == 0
    planted = images.copy()
    planted[rows] = change(images[rows])

    assert column in columns(arrivals.judged(planted, labels))


def test_what_cannot_be_judged_is_named(arrivals: Arrivals) -> None:
    images, labels = arrivals.new[0][:200], arrivals.new[1][:200]
    table = image_table(images, labels)
    known = arrivals.accepted["digest"].to_numpy()

    without = validate_batch(table, accepted=known, holdout=arrivals.holdout)
    few = arrivals.judged(images, labels)

    assert without.skipped == (
        "the champion's view of the labels: no champion was asked",
        "the distribution: no reference profile was given",
    )
    assert few.skipped[1] == (
        "the distribution: 200 images are too few to compare with accepted ones, "
        "expected at least 500"
    )


def test_a_profile_of_the_same_images_has_no_drift_and_survives_json(arrivals: Arrivals) -> None:
    profile = reference_profile(arrivals.accepted)

    assert ReferenceProfile.model_validate_json(profile.model_dump_json()) == profile
    assert drift_table(arrivals.accepted, profile).iloc[0].tolist() == [0.0] * len(FEATURES)


def test_the_stability_index_is_the_sum_that_its_definition_states() -> None:
    profile = ReferenceProfile(
        features={"ink": FeatureProfile(edges=(0.5,), counts=(749, 249), total=500)}
    )
    table = pd.DataFrame({"ink": [0.1] * 49 + [0.9] * 49})

    index = drift_table(table, profile)["psi_ink"].item()

    p, q = np.array([0.5, 0.5]), np.array([749.5, 249.5]) / 999
    assert index == pytest.approx(((p - q) * np.log(p / q)).sum())


def test_a_profile_of_nothing_is_refused(arrivals: Arrivals) -> None:
    with pytest.raises(ValueError, match="no images to make a reference profile of"):
        reference_profile(arrivals.accepted[:0])


def test_a_profile_whose_parts_do_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="1 edges and 3 counts; expected ascending edges"):
        FeatureProfile(edges=(0.5,), counts=(1, 2, 3), total=1)


def test_a_profile_that_is_extended_counts_all_images_in_the_bins_of_the_first(
    sample: Splits,
) -> None:
    table = image_table(sample[0].images, sample[0].labels)
    first, rest = table.iloc[:900], table.iloc[900:]
    before = reference_profile(first)
    after = before.extended(rest)
    assert (before.images, after.images) == (900, len(table))
    for feature, profile in after.features.items():
        assert profile.edges == before.features[feature].edges
        assert profile.mean == pytest.approx(table[feature].mean())
    assert ReferenceProfile.model_validate_json(after.model_dump_json()) == after


def test_two_profiles_are_compared_feature_by_feature_and_digit_by_digit(sample: Splits) -> None:
    train = sample[0]
    table = image_table(train.images, train.labels)
    before = reference_profile(table)
    threes = table[table["label"] == 3]
    changes = {
        change.feature: change for change in compare_profiles(before, before.extended(threes))
    }
    assert changes["digit 3"].before == pytest.approx(len(threes) / len(table))
    assert changes["digit 3"].after == pytest.approx(2 * len(threes) / (len(table) + len(threes)))
    label, contrast = (changes[name].stability_index or 0 for name in ("label", "contrast"))
    assert label > contrast > 0
    same = compare_profiles(before, before)
    assert all(change.before == change.after for change in same)


def test_profiles_of_different_data_sets_are_not_compared(sample: Splits) -> None:
    ours, theirs = (reference_profile(image_table(s.images, s.labels)) for s in sample)
    with pytest.raises(ValueError, match="different bins of ink: they belong to different data"):
        compare_profiles(ours, theirs)
