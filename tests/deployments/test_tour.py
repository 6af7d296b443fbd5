"""The pieces of the tour, on the embedded sample."""

from datetime import UTC, datetime

import httpx
import numpy as np
import pytest
from prefect.client.orchestration import SyncPrefectClient

from deployments.drop import announce
from deployments.stack import StackError
from deployments.tour import POLICY, Parts, Row, sample_parts, table
from expectations.image_table import image_table
from expectations.reference import reference_profile
from expectations.validation import validate_batch
from mnist_cnn.digits import Digits
from mnist_cnn.evaluation import evaluate, measure_all
from mnist_cnn.promotion import ReuseHistory, Scored, decide
from mnist_cnn.promotion.comparison import images_to_prove
from mnist_cnn.promotion.decision import evidence_level
from mnist_cnn.training import TrainingConfig, train


@pytest.fixture(scope="module")
def parts() -> Parts:
    return sample_parts()


def test_each_tour_is_cut_alike_and_no_image_is_in_two_parts(parts: Parts) -> None:
    again = sample_parts()
    assert again.good.digest() == parts.good.digest()
    assert again.shuffled.digest() == parts.shuffled.digest()
    upright = Digits(255 - parts.inverted.images, parts.inverted.labels)
    pieces = [parts.train, parts.test, parts.good, parts.shuffled, upright]
    images = np.concatenate([piece.images for piece in pieces])
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == len(images)


def test_the_margins_can_be_proved_with_the_images_that_there_are(parts: Parts) -> None:
    level = evidence_level(POLICY.alpha, 2)
    assert images_to_prove(POLICY.overall_margin, level) <= len(parts.test)
    assert images_to_prove(POLICY.factor_margin, level) <= len(parts.test)
    assert images_to_prove(POLICY.class_margin, level) <= np.bincount(parts.test.labels).min()


def test_the_table_has_equal_columns() -> None:
    rows = [Row("1", "base (1,500)", "Promoted", "95.00%", "version 1", "40")]
    head, line = table(rows).splitlines()
    assert head.split() == ["week", "arrived", "verdict", "accuracy", "champion", "seconds"]
    assert line.index("Promoted") == head.index("verdict")


@pytest.mark.slow
def test_what_arrives_in_the_second_week_is_good_and_in_the_third_bad(parts: Parts) -> None:
    held = image_table(parts.train.images, parts.train.labels)
    holdout = image_table(parts.test.images, parts.test.labels)[["digest", "near_digest"]]

    def critical(digits: Digits) -> set[str]:
        report = validate_batch(
            image_table(digits.images, digits.labels),
            accepted=held["digest"].to_numpy(),
            holdout=holdout,
            reference=reference_profile(held),
        )
        return {finding.sentence for finding in report.critical}

    assert not critical(parts.good)
    assert critical(parts.inverted)
    assert critical(parts.shuffled)


@pytest.mark.slow
def test_the_second_model_of_the_sample_is_promoted(parts: Parts) -> None:
    grown = Digits(
        np.concatenate([parts.train.images, parts.good.images]),
        np.concatenate([parts.train.labels, parts.good.labels]),
    )
    measured = measure_all(
        {
            "first": train(parts.train, TrainingConfig(), "cpu").model,
            "second": train(grown, TrainingConfig(), "cpu").model,
        },
        parts.test,
    )

    def scored(name: str, until: datetime | None) -> Scored:
        outcomes = measured[name]
        figures = evaluate(outcomes, parts.test, model=name, snapshot="sample", outcomes=name)
        arrays = outcomes.arrays()
        probabilities = arrays.pop("probabilities")
        return Scored(
            model=name,
            snapshot="sample",
            test_split="sample",
            labels=parts.test.labels,
            right=probabilities.argmax(1) == parts.test.labels,
            factors={factor: found == parts.test.labels for factor, found in arrays.items()},
            data_until=until,
            shifted_prior_accuracy=figures.priors.worst.accuracy,
            calibration_error=figures.calibration.expected_error,
            error_confidence=figures.confidence.when_wrong,
            latency_ms=1,  # neither is measured here
            size_bytes=100_000,
        )

    first, second = scored("first", None), scored("second", datetime.now(UTC))
    alone = decide(first, None, POLICY, ReuseHistory("sample", ()))
    assert alone.verdict == "promote", alone.reason
    then = decide(second, first, POLICY, ReuseHistory("sample", ("first",)))
    assert then.verdict == "promote", then.reason


class Deaf(SyncPrefectClient):
    """A client whose server went away after it was greeted."""

    def __init__(self) -> None:
        pass

    def request(self, *_: object, **__: object) -> httpx.Response:
        raise httpx.ConnectError("connection refused")


def test_an_arrival_that_the_server_does_not_hear_of_is_a_sentence() -> None:
    with pytest.raises(StackError, match=r"monday lies there.*refused.*nightly run"):
        announce(Deaf(), "digits", "monday")
