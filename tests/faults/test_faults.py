"""A part of the table of faults, on real servers; `make faults` runs all of it."""

import os
from collections.abc import Iterator

import pytest

from tests.faults.bench import Bench, opened
from tests.faults.prepare import Template, train_template
from tests.faults.stages import STAGES
from tests.faults.table import FAULTS, Outcome, Pair, choose_pairs, line, run_pair, summary

SEED = int(os.environ.get("FAULTS_SEED") or 0)
PAIRS = choose_pairs(SEED, 2)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with opened(tmp_path_factory.mktemp("bench")) as bench:
        yield bench


@pytest.fixture(scope="module")
def template(bench: Bench) -> Template:
    return train_template(bench)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair.fault} at {pair.stage}")
def test_a_run_recovers_from_a_fault_or_somebody_is_told(
    bench: Bench, template: Template, pair: Pair
) -> None:
    outcome = run_pair(bench, template, pair, f"pair-{PAIRS.index(pair)}")
    assert outcome.passed, line(outcome)


def test_every_pair_of_fault_and_stage_is_in_the_table_once() -> None:
    pairs = choose_pairs(0, None)
    assert len(pairs) == len(FAULTS) * len(STAGES) >= 60
    assert len({(pair.fault, pair.stage) for pair in pairs}) == len(pairs)


def test_the_seed_chooses_the_part() -> None:
    assert choose_pairs(3, 4) == choose_pairs(3, 4)
    assert choose_pairs(3, 4) != choose_pairs(4, 4)


def test_a_pair_passes_only_if_nothing_is_lost_and_nobody_is_left_in_the_dark() -> None:
    def outcome(ending: str, *problems: str) -> Outcome:
        return Outcome(PAIRS[0], ending, "Removed", "", 1.0, None, problems)  # type: ignore[arg-type]

    endings = [outcome("recovered"), outcome("told"), outcome("neither"), outcome("told", "lost")]
    assert [each.passed for each in endings] == [True, True, False, False]
    assert summary(endings).startswith("4 pairs of fault and stage: 1 recovered, 2 told, 1 neither")
