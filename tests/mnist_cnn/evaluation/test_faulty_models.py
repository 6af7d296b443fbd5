import time
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
import torch
from torch import nn

from mnist_cnn.digits import Digits
from mnist_cnn.evaluation import predict
from mnist_cnn.evaluation.faulty_models import Fault, plant_faults
from mnist_cnn.promotion import Decision, PromotionPolicy, ReuseHistory, Scored, decide
from mnist_cnn.sample import embedded_sample
from mnist_cnn.training import TrainingConfig, train

NOISE = "Gaussian noise=0.08"
POLICY = PromotionPolicy(
    accuracy_floor=0.9, worst_class_floor=0.75, factor_floors={NOISE: 0.5}, latency_ceiling_ms=20
)
"""The sample has 36 images of a digit and is harder than MNIST."""

MONDAY = datetime(2026, 11, 2, tzinfo=UTC)


@pytest.fixture(scope="module")
def sample() -> Digits:
    return embedded_sample()[1]


@pytest.fixture(scope="module")
def good() -> nn.Module:
    """Good, not perfect: it errs on a few test images, so that it can be beaten."""
    whole = embedded_sample()[0]
    part = Digits(whole.images[:500], whole.labels[:500])
    return train(part, TrainingConfig(epochs=4, batch_size=50), "cpu").model


@pytest.fixture(scope="module")
def faults(good: nn.Module, sample: Digits) -> dict[str, Fault]:
    return {fault.name: fault for fault in plant_faults(good, sample, NOISE)}


def score(model: nn.Module, digits: Digits, name: str, until: datetime) -> Scored:
    """Measure a model as the real evaluation does, with one condition."""
    noise = np.random.default_rng(0).normal(0, 0.08 * 255, digits.images.shape)
    noisy = np.clip(np.rint(digits.images + noise), 0, 255).astype(np.uint8)
    probabilities = predict(model, digits.images)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == digits.labels
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        predict(model, digits.images[:1])
        seconds.append(time.perf_counter() - start)
    return Scored(
        model=name,
        snapshot="sample",
        test_split="sample",
        labels=digits.labels,
        right=right,
        factors={NOISE: predict(model, noisy).argmax(1) == digits.labels},
        data_until=until,
        shifted_prior_accuracy=0.99,
        calibration_error=float(abs(confidence.mean() - right.mean())),
        error_confidence=float(confidence[~right].mean()) if not right.all() else None,
        latency_ms=min(seconds) * 1000,
        size_bytes=150_000,
    )


def judge(fault: Fault, good: nn.Module, sample: Digits, until: datetime) -> Decision:
    candidate = score(fault.model.eval(), sample, fault.name, until)
    champion = score(good, sample, "champion", MONDAY)
    return decide(candidate, champion, POLICY, ReuseHistory("sample"))


NAMES = [
    "labels of one digit shuffled in training",
    "blind to one digit",
    "better overall, worse under noise",
    "over-confident",
    "slow",
]


def test_the_good_model_passes_every_floor(good: nn.Module, sample: Digits) -> None:
    scored = score(good, sample, "good", MONDAY)
    assert decide(scored, None, POLICY, ReuseHistory("sample")).verdict == "promote"


def test_every_fault_has_a_test(faults: dict[str, Fault]) -> None:
    assert [*faults] == [*NAMES, "a tie", "newer, and a little less accurate"]


@pytest.mark.parametrize("name", NAMES)
def test_a_planted_fault_is_refused_for_what_it_is_even_on_newer_data(
    name: str, faults: dict[str, Fault], good: nn.Module, sample: Digits
) -> None:
    decision = judge(faults[name], good, sample, MONDAY + timedelta(days=7))
    assert decision.verdict == "keep"
    failed = {check.name for check in decision.checks if not check.passed}
    assert failed.issuperset(faults[name].refused_by)


def test_a_tie_is_refused_on_data_of_the_same_age(
    faults: dict[str, Fault], good: nn.Module, sample: Digits
) -> None:
    decision = judge(faults["a tie"], good, sample, MONDAY)
    assert decision.verdict == "keep"
    assert "gain seen overall" in decision.reason or "nothing speaks" in decision.reason


def test_a_model_that_is_newer_and_a_little_less_accurate_errs_on_five_images_more(
    faults: dict[str, Fault], good: nn.Module, sample: Digits
) -> None:
    fault = faults["newer, and a little less accurate"]
    assert fault.newer
    decision = judge(fault, good, sample, MONDAY + timedelta(days=7))
    assert decision.verdict == "keep"
    overall = decision.comparisons[0]
    assert (overall.gains, overall.losses) == (0, 5)
    failed = {check.name for check in decision.checks if not check.passed}
    assert failed.issuperset(fault.refused_by)


def test_a_margin_that_forgives_five_images_does_not_let_the_newer_model_in(
    faults: dict[str, Fault], good: nn.Module, sample: Digits
) -> None:
    """On MNIST five images are within the margin; here the margin is widened to them."""
    fault = faults["newer, and a little less accurate"]
    candidate = score(fault.model.eval(), sample, fault.name, MONDAY + timedelta(days=7))
    champion = score(good, sample, "champion", MONDAY)
    wide = POLICY.model_copy(update={"overall_margin": 0.015, "class_margin": 0.2})
    decision = decide(candidate, champion, wide, ReuseHistory("sample"))
    assert decision.verdict == "keep"
    assert not [check for check in decision.checks if check.kind == "loss" and not check.passed]
    assert "right on -5 images: it is less accurate" in decision.reason


def test_slowness_changes_no_answer(
    faults: dict[str, Fault], good: nn.Module, sample: Digits
) -> None:
    answers = predict(good, sample.images).argmax(1)
    for name in ("slow", "a tie"):
        assert (predict(faults[name].model, sample.images).argmax(1) == answers).all()


def test_over_confidence_shows_more_in_the_wrong_answers_than_in_the_calibration_error(
    faults: dict[str, Fault], good: nn.Module, sample: Digits
) -> None:
    before = score(good, sample, "good", MONDAY)
    after = score(faults["over-confident"].model, sample, "over-confident", MONDAY)
    assert before.error_confidence is not None
    assert after.error_confidence is not None
    assert before.error_confidence < 0.7
    assert after.error_confidence > 0.9
    assert after.calibration_error is not None
    assert after.calibration_error < POLICY.calibration_ceiling


def test_the_blind_model_never_answers_its_digit_and_all_others_as_before(
    faults: dict[str, Fault], good: nn.Module, sample: Digits
) -> None:
    before = predict(good, sample.images).argmax(1)
    after = predict(faults["blind to one digit"].model, sample.images).argmax(1)
    assert 7 in before
    assert 7 not in after
    assert (after == before)[before != 7].all()


def test_shuffled_labels_leave_the_other_digits_alone(
    faults: dict[str, Fault], good: nn.Module, sample: Digits
) -> None:
    before = predict(good, sample.images).argmax(1)
    model = faults["labels of one digit shuffled in training"].model
    after = predict(model, sample.images).argmax(1)
    assert (after == before)[before != 3].all()
    assert (after == 3)[before == 3].mean() < 0.4
    assert len(set(after[before == 3].tolist())) >= 6


def test_the_model_that_is_worse_under_noise_is_better_overall(
    faults: dict[str, Fault], good: nn.Module, sample: Digits
) -> None:
    """So that accuracy alone would promote it."""
    fault = faults["better overall, worse under noise"]
    decision = judge(fault, good, sample, MONDAY)
    overall = decision.comparisons[0]
    assert overall.gains > 0 == overall.losses
    noise = next(check for check in decision.checks if check.name == f"loss seen: {NOISE}")
    assert noise.observed is not None
    assert noise.observed < -0.1
    barred = [c for c in decision.checks if c.kind in {"floor", "loss"} and not c.passed]
    assert barred == [noise]


def test_a_faulty_model_gives_the_same_answers_again(
    faults: dict[str, Fault], sample: Digits
) -> None:
    for fault in faults.values():
        once, again = (predict(fault.model, sample.images[:50]) for _ in range(2))
        assert np.array_equal(once, again), fault.name


def test_answers_do_not_depend_on_the_batch(faults: dict[str, Fault], sample: Digits) -> None:
    for fault in faults.values():
        together = predict(fault.model, sample.images[:50]).argmax(1)
        apart = predict(fault.model, sample.images[:50], batch_size=7).argmax(1)
        assert np.array_equal(together, apart), fault.name


def test_a_gate_without_the_right_floor_lets_the_fault_through(
    faults: dict[str, Fault], sample: Digits
) -> None:
    """The refusals come from the policy: loosen one floor, and its fault is not refused for it."""
    loose = POLICY.model_copy(update={"error_confidence_ceiling": 0.999999})
    scored = score(faults["over-confident"].model, sample, "loose", MONDAY)
    refused = []
    for policy in (POLICY, loose):
        decision = decide(scored, None, policy, ReuseHistory("sample"))
        refused.append({check.name for check in decision.checks if not check.passed})
    assert refused[0] - refused[1] == {"mean confidence of wrong answers"}


def test_faults_that_are_tensors_only_survive_export(
    faults: dict[str, Fault], sample: Digits
) -> None:
    images = torch.from_numpy(sample.images[:4].copy())
    for name in NAMES[:4]:
        exported = torch.export.export(faults[name].model.eval(), (images,)).module()
        expected = faults[name].model(images)
        assert torch.equal(exported(images).argmax(1), expected.argmax(1)), name
