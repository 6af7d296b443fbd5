from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from mnist_cnn.promotion import Decision, PromotionPolicy, ReuseHistory, Scored, decide
from mnist_cnn.promotion.decision import evidence_level

IMAGES = 10_000
NOISE = "Gaussian noise=0.08"
POLICY = PromotionPolicy(factor_floors={NOISE: 0.9, "blur=1": 0.9})
FIRST = ReuseHistory("split")
MONDAY = datetime(2026, 11, 2, tzinfo=UTC)


def right(wrong: Iterable[int], images: int = IMAGES) -> np.ndarray:
    outcome = np.ones(images, bool)
    outcome[list(wrong)] = False
    return outcome


def scored(
    wrong: Iterable[int] = range(80), factors: dict[str, Iterable[int]] | None = None, **other: Any
) -> Scored:
    """A good model, wrong on the first 80 images, with image i showing the digit i % 10."""
    factors = {NOISE: range(200), "blur=1": range(300), **(factors or {})}
    return replace(
        Scored(
            model="models:/m/2",
            snapshot="snapshot",
            test_split="split",
            labels=np.arange(IMAGES) % 10,
            right=right(wrong),
            factors={name: right(images) for name, images in factors.items()},
            data_until=MONDAY,
            shifted_prior_accuracy=0.99,
            calibration_error=0.05,
            error_confidence=0.6,
            latency_ms=0.4,
            size_bytes=150_000,
        ),
        **other,
    )


CHAMPION = scored(model="models:/m/1")
NEWER = MONDAY + timedelta(days=7)


def after(decisions: int) -> ReuseHistory:
    """Return the history of a test split that decided so often on other models."""
    return ReuseHistory("split", tuple(f"models:/old/{n}" for n in range(decisions)))


def failed(decision: Decision, kind: str) -> list[str]:
    return [check.name for check in decision.checks if check.kind == kind and not check.passed]


def test_without_a_policy_nothing_is_promoted() -> None:
    decision = decide(scored(range(0), data_until=NEWER), CHAMPION, None, FIRST)
    assert decision.verdict == "keep"
    assert "there is no policy" in decision.reason
    assert decide(scored(), None, None, FIRST).verdict == "keep"


def test_an_empty_policy_promotes_nothing() -> None:
    empty = PromotionPolicy(factor_floors={})
    for champion in (None, CHAMPION):
        decision = decide(scored(range(0), data_until=NEWER), champion, empty, FIRST)
        assert decision.verdict == "keep"
        assert "names no factor" in decision.reason


def test_the_first_model_has_to_keep_every_floor() -> None:
    decision = decide(scored(), None, POLICY, FIRST)
    assert decision.verdict == "promote"
    assert decision.champion is None
    assert "no champion yet" in decision.reason
    assert decision.comparisons == []


BELOW: list[tuple[dict[str, Any], str]] = [
    ({"right": right(range(201))}, "accuracy"),
    ({"right": right(range(0, 410, 10))}, "accuracy of the worst digit"),
    ({"shifted_prior_accuracy": 0.9749}, "accuracy under the worst digit frequencies"),
    ({"calibration_error": 0.151}, "calibration error"),
    ({"error_confidence": 0.81}, "mean confidence of wrong answers"),
    ({"latency_ms": 10.1}, "latency of one image, ms"),
    ({"size_bytes": 1_000_001}, "size, bytes"),
    ({"factors": {NOISE: right(range(1001)), "blur=1": right([])}}, f"accuracy under {NOISE}"),
]


@pytest.mark.parametrize(("change", "name"), BELOW)
def test_each_floor_alone_refuses_even_the_first_and_even_a_better_model(
    change: dict[str, Any], name: str
) -> None:
    weak = replace(scored(), **change)
    for champion in (None, replace(scored(range(900)), **change, model="models:/m/1")):
        decision = decide(weak, champion, POLICY, FIRST)
        assert decision.verdict == "keep"
        assert failed(decision, "floor") == [name]
        assert name in decision.reason


UNMEASURED = ["shifted_prior_accuracy", "calibration_error", "latency_ms", "size_bytes"]


@pytest.mark.parametrize("value", [None, float("nan")])
@pytest.mark.parametrize("figure", [*UNMEASURED, "error_confidence"])
def test_a_figure_that_was_not_measured_breaks_its_floor(figure: str, value: float | None) -> None:
    unmeasured: dict[str, Any] = {figure: value}
    decision = decide(replace(scored(), **unmeasured), None, POLICY, FIRST)
    assert decision.verdict == "keep"
    assert len(failed(decision, "floor")) == 1


def test_a_condition_that_was_not_measured_breaks_its_floor() -> None:
    decision = decide(scored(factors={}), None, PromotionPolicy(factor_floors={"fog": 0.9}), FIRST)
    assert decision.verdict == "keep"
    assert "accuracy under fog: it was not measured" in decision.reason


def test_a_digit_without_images_breaks_the_floor_of_the_worst_digit() -> None:
    decision = decide(scored(labels=np.arange(IMAGES) % 9), None, POLICY, FIRST)
    assert failed(decision, "floor") == ["accuracy of the worst digit"]
    assert "only 9 of 10 digits" in decision.reason


def test_a_model_that_is_never_wrong_has_no_confident_errors() -> None:
    assert decide(scored([], error_confidence=None), None, POLICY, FIRST).verdict == "promote"


def test_a_tie_keeps_the_champion() -> None:
    decision = decide(scored(), CHAMPION, POLICY, FIRST)
    assert decision.verdict == "keep"
    assert "nothing speaks for a change" in decision.reason


def test_a_tie_on_newer_data_replaces_a_champion_of_older_data() -> None:
    decision = decide(scored(data_until=NEWER), CHAMPION, POLICY, FIRST)
    assert decision.verdict == "promote"
    assert "trained on older data" in decision.reason


AGES: list[tuple[datetime | None, datetime | None, str]] = [
    (None, None, "both were trained on the base data set alone"),
    (None, MONDAY, "was not trained on older data: until 2026-11-02"),
    (MONDAY, MONDAY, "was not trained on older data"),
    (MONDAY, NEWER, "was not trained on older data: until 2026-11-09"),
]


@pytest.mark.parametrize(("ours", "theirs", "sentence"), AGES)
def test_a_champion_whose_data_are_not_older_survives_a_tie(
    ours: datetime | None, theirs: datetime | None, sentence: str
) -> None:
    champion = replace(CHAMPION, data_until=theirs)
    decision = decide(scored(data_until=ours), champion, POLICY, FIRST)
    assert decision.verdict == "keep"
    assert sentence in decision.reason


def test_whatever_arrived_is_newer_than_the_base_data_set() -> None:
    champion = replace(CHAMPION, data_until=None)
    decision = decide(scored(data_until=MONDAY), champion, POLICY, FIRST)
    assert decision.verdict == "promote"
    assert "older data: without any batch, candidate until 2026-11-02" in decision.reason


def test_a_superior_model_is_promoted_on_data_of_any_age() -> None:
    better = scored(range(60))
    for candidate in (better, replace(better, data_until=None)):
        decision = decide(candidate, CHAMPION, POLICY, FIRST)
        assert decision.verdict == "promote"
        assert "exact McNemar p = 9.5e-07" in decision.reason  # 2^-20: twenty gains, no loss


def test_a_gain_that_may_be_chance_needs_approval() -> None:
    """20 gains and 12 losses: p = 0.11 (sum of binomials(32, k >= 20) / 2^32)."""
    candidate = scored([*range(20, 80), *range(1000, 1012)])
    decision = decide(candidate, CHAMPION, POLICY, FIRST)
    assert decision.verdict == "needs-approval"
    superior = next(check for check in decision.checks if check.name == "superior overall")
    assert superior.observed == pytest.approx(0.10766, abs=1e-5)


def test_a_proved_no_worse_model_of_the_same_data_with_a_gain_needs_approval() -> None:
    decision = decide(scored(range(1, 80)), CHAMPION, POLICY, FIRST)
    assert decision.verdict == "needs-approval"
    assert "proved to be no worse anywhere, but" in decision.reason


def test_newer_data_alone_do_not_outweigh_a_loss_within_the_margin() -> None:
    decision = decide(scored(range(85), data_until=NEWER), CHAMPION, POLICY, FIRST)
    assert decision.verdict == "keep"
    assert failed(decision, "evidence") == ["no worse: overall"]
    assert "right on -5 images: it is less accurate" in decision.reason


def test_a_gain_that_these_images_alone_do_not_back_is_not_offered() -> None:
    """103 gains and 100 losses, 1.645 standard deviations of 14.2: 20 images may be lost."""
    candidate = scored([*range(183, 263), *range(263, 363)])
    champion = replace(CHAMPION, right=right([*range(80), *range(160, 263)]))
    decision = decide(candidate, champion, POLICY, FIRST)
    assert decision.comparisons[0].gains == 103
    assert decision.comparisons[0].losses == 100
    assert decision.verdict == "keep"
    assert "were this the only decision on these images" in decision.reason


def test_a_tie_on_newer_data_that_a_first_decision_would_prove_is_offered_later() -> None:
    """From the 33rd decision on, 10,000 images without one loss prove nothing within 0.1 points."""
    verdicts = [
        decide(scored(data_until=NEWER), CHAMPION, POLICY, after(before)).verdict
        for before in (0, 31, 32, 200)
    ]
    assert verdicts == ["promote", "promote", "needs-approval", "needs-approval"]


def test_whoever_approves_every_offer_promotes_nothing_that_is_less_accurate() -> None:
    draw = np.random.default_rng(4)
    offered = 0
    for _ in range(300):
        ours, theirs = (
            scored(draw.choice(200, draw.integers(60, 100), replace=False)) for _ in "ab"
        )
        decision = decide(
            replace(ours, data_until=NEWER), theirs, POLICY, after(int(draw.integers(100)))
        )
        if decision.verdict == "needs-approval":
            offered += 1
            assert ours.right.sum() >= theirs.right.sum()
    assert offered > 30


@pytest.mark.slow
def test_of_models_worse_by_the_margin_at_most_alpha_are_offered() -> None:
    """Gains of a mean of 20, losses of a mean of 30 images: truly worse by 0.1 points."""
    draw = np.random.default_rng(5)
    weeks, offered = 1000, 0
    for _ in range(weeks):
        gains, losses = draw.poisson(20), draw.poisson(30)
        candidate = scored([*range(gains, 80), *range(1000, 1000 + losses)], data_until=NEWER)
        offered += decide(candidate, CHAMPION, POLICY, after(52)).verdict != "keep"
    assert 0 < offered <= 1.3 * POLICY.alpha * weeks  # two standard deviations above alpha


@pytest.mark.parametrize(
    ("candidate", "name"),
    [
        (scored(range(91)), "loss seen: overall"),
        (scored([*range(60), *range(103, 333, 10)]), "loss seen: digit 3"),
        (scored(range(40), {NOISE: range(401)}), f"loss seen: {NOISE}"),
    ],
)
def test_worse_anywhere_beyond_the_margin_keeps_the_champion_whatever_else_is_better(
    candidate: Scored, name: str
) -> None:
    decision = decide(replace(candidate, data_until=NEWER), CHAMPION, POLICY, FIRST)
    assert decision.verdict == "keep"
    assert failed(decision, "loss") == [name]


def test_a_loss_of_just_the_margin_is_not_beyond_it_and_not_proved() -> None:
    decision = decide(scored(range(90), data_until=NEWER), CHAMPION, POLICY, FIRST)
    assert decision.verdict == "keep"
    assert failed(decision, "loss") == []
    assert failed(decision, "evidence") == ["no worse: overall"]


def test_a_superior_model_that_may_be_worse_under_a_condition_needs_approval() -> None:
    candidate = scored(range(40), {NOISE: [*range(500, 890)]})
    decision = decide(candidate, CHAMPION, POLICY, FIRST)
    assert decision.verdict == "needs-approval"
    assert failed(decision, "evidence") == [f"no worse: {NOISE}"]


def test_a_condition_that_the_policy_does_not_name_does_not_count() -> None:
    candidate = scored(range(60), {"fog": range(9000)})
    assert decide(candidate, CHAMPION, POLICY, FIRST).verdict == "promote"


def test_a_condition_that_was_not_measured_for_the_champion_needs_approval() -> None:
    champion = replace(CHAMPION, factors={NOISE: CHAMPION.factors[NOISE]})
    decision = decide(scored(range(40)), champion, POLICY, FIRST)
    assert decision.verdict == "needs-approval"
    assert "blur=1: it was not measured for the champion" in decision.reason


def test_a_condition_with_too_few_images_says_how_many_it_takes() -> None:
    few = right([], 100)
    candidate = scored(range(60), data_until=NEWER)
    candidate = replace(candidate, factors={**candidate.factors, NOISE: few})
    champion = replace(CHAMPION, factors={**CHAMPION.factors, NOISE: few})
    decision = decide(candidate, champion, POLICY, FIRST)
    assert decision.verdict == "needs-approval"
    assert "100 images cannot prove it even without one loss: bring 185" in decision.reason


def test_every_place_is_compared_and_every_check_is_recorded() -> None:
    decision = decide(scored(), CHAMPION, POLICY, FIRST)
    places = ["overall", *[f"digit {digit}" for digit in range(10)], NOISE, "blur=1"]
    assert [comparison.place for comparison in decision.comparisons] == places
    names = [check.name for check in decision.checks]
    assert len(set(names)) == len(names) == 1 + 9 + 3 + 2 + 2 * 13
    assert all(check.sentence for check in decision.checks)


def test_a_rejection_is_recorded_as_completely_as_a_promotion() -> None:
    kept = decide(scored(range(500), latency_ms=99), CHAMPION, POLICY, FIRST)
    promoted = decide(scored(range(60)), CHAMPION, POLICY, FIRST)
    assert (kept.verdict, promoted.verdict) == ("keep", "promote")
    assert [c.name for c in kept.checks] == [c.name for c in promoted.checks]


def test_a_decision_survives_the_way_through_json() -> None:
    decision = decide(scored(shifted_prior_accuracy=None), CHAMPION, POLICY, FIRST)
    assert Decision.model_validate_json(decision.model_dump_json()) == decision


def test_the_levels_of_all_decisions_sum_to_less_than_alpha() -> None:
    levels = [evidence_level(0.05, decision) for decision in range(1, 10_001)]
    assert levels[:3] == pytest.approx([0.025, 0.05 / 6, 0.05 / 12])
    assert all(before > after for before, after in pairwise(levels))
    assert 0.049 < sum(levels) < 0.05


def test_what_was_evidence_at_first_is_none_after_many_decisions_on_the_same_split() -> None:
    candidate = scored([*range(22, 80), *range(1000, 1004)])  # 22 gains, 4 losses
    verdicts = []
    for before in (0, 5, 100):
        decision = decide(candidate, CHAMPION, POLICY, after(before))
        assert decision.decisions == before + 1
        verdicts.append(decision.verdict)
    assert verdicts == ["promote", "promote", "needs-approval"]


def test_a_repeated_decision_is_counted_once_and_gives_the_same_record() -> None:
    before = ("models:/m/0", "models:/m/1")
    first = decide(scored(), CHAMPION, POLICY, ReuseHistory("split", before))
    later = ReuseHistory("split", (*before, "models:/m/2", "models:/m/2", "models:/m/3"))
    assert first.decisions == 3
    assert decide(scored(), CHAMPION, POLICY, later) == first


def test_losing_more_images_never_improves_the_verdict() -> None:
    order = {"keep": 0, "needs-approval": 1, "promote": 2}
    for until, history in ((MONDAY, FIRST), (NEWER, after(40))):
        verdicts = [
            order[decide(scored(range(wrong), data_until=until), CHAMPION, POLICY, history).verdict]
            for wrong in range(40, 100, 2)
        ]
        assert verdicts == sorted(verdicts, reverse=True)
        assert set(verdicts) == {0, 1, 2}


def test_two_models_never_both_replace_each_other_on_data_of_one_age() -> None:
    draw = np.random.default_rng(3)
    for _ in range(30):
        ours, theirs = (scored(draw.permutation(IMAGES)[: draw.integers(40, 150)]) for _ in "ab")
        there = decide(ours, theirs, POLICY, FIRST).verdict
        back = decide(theirs, ours, POLICY, FIRST).verdict
        assert there == "keep" or back == "keep"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"snapshot": "other"}, "on snapshot snapshot, the champion on other"),
        ({"test_split": "other"}, "on test split split, the champion on other"),
        ({"labels": np.arange(IMAGES) % 7}, "different labels"),
        (
            {"labels": np.arange(9) % 10, "right": np.ones(9, bool)},
            "on images 10000, the champion on 9",
        ),
        ({"factors": {NOISE: np.ones(9, bool), "blur=1": right([])}}, "noise=0.08: .* of 9"),
    ],
)
def test_evaluations_of_other_images_are_not_compared(
    change: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        decide(scored(), replace(CHAMPION, **change), POLICY, FIRST)


def test_a_history_of_another_test_split_is_refused() -> None:
    with pytest.raises(ValueError, match="the history is of test split other"):
        decide(scored(), None, POLICY, ReuseHistory("other"))


def test_outcomes_that_do_not_fit_their_labels_are_refused() -> None:
    for wrong in (np.ones(9, bool), np.ones(IMAGES), np.ones(0, bool)):
        with pytest.raises(ValueError, match="evaluate it again"):
            scored(right=wrong)
    with pytest.raises(ValueError, match="at least one"):
        scored(right=np.ones(0, bool), labels=np.arange(0))


def test_a_date_without_a_time_zone_is_refused() -> None:
    with pytest.raises(ValueError, match="without a time zone"):
        scored(data_until=datetime(2026, 11, 2))  # noqa: DTZ001 - the mistake is the subject


@pytest.mark.parametrize(
    "mistake",
    [
        {"acuracy_floor": 0.9},
        {"accuracy_floor": 0},
        {"accuracy_floor": None},
        {"overall_margin": 0},
        {"alpha": 0.5},
        {"factor_floors": {"blur=1": 2}},
        {"factor_floors": None},
        {"size_ceiling_bytes": -1},
    ],
)
def test_a_policy_with_a_mistake_is_refused(mistake: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PromotionPolicy(**mistake)


def test_production_s_policy_names_conditions_and_describes_every_field() -> None:
    assert len(PromotionPolicy().factor_floors) >= 10
    assert all(field.description for field in PromotionPolicy.model_fields.values())
