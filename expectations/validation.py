"""Validation of image tables by the suites, with a plain sentence for each finding."""

import math
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from expectations.reference import ReferenceProfile, drift_table

if TYPE_CHECKING:
    import pandas as pd
    from great_expectations import ExpectationSuite

# Chance alone gives 100 images a population stability index of about 0.1, and 500 of 0.02.
FEWEST_FOR_DRIFT = 500
"""Least size of a batch whose distribution is compared with the accepted images."""

_SHOWN = 5  # offending values named in a sentence


class Finding(BaseModel, frozen=True, extra="forbid"):
    """Result of one expectation.

    `observed` is a number, a list or a phrase, as the expectation measures it; `rows` are the first
    20 offending rows of the table, where the expectation is about single images.
    """

    suite: str
    expectation: str
    column: str | None
    bounds: dict[str, Any]
    severity: Literal["critical", "warning", "info"]
    description: str
    success: bool
    observed: str
    expected: str
    rows: tuple[int, ...]

    @property
    def sentence(self) -> str:
        """One line: suite, expectation, column, observed value and bound."""
        return (
            f"{self.suite}: {self.expectation}({self.column or ''}): "
            f"observed {self.observed}, expected {self.expected}"
        )


class ValidationReport(BaseModel, frozen=True, extra="forbid"):
    """Findings of all suites; `raw` holds Great Expectations' own results by suite, JSON-ready.

    `skipped` has a sentence for each part that could not be judged, with the reason.
    """

    findings: tuple[Finding, ...]
    skipped: tuple[str, ...] = ()
    raw: dict[str, dict[str, Any]]

    @property
    def critical(self) -> tuple[Finding, ...]:
        """The failures that refuse the data."""
        return tuple(f for f in self.findings if not f.success and f.severity == "critical")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """The failures that are only reported."""
        return tuple(f for f in self.findings if not f.success and f.severity != "critical")


def validate(training_table: "pd.DataFrame", test_table: "pd.DataFrame") -> ValidationReport:
    """Validate both splits, each by its own suite, and check the training split for leakage.

    Leakage is a training image that recurs in the test split. Both tables come from `image_table`
    and are not changed.
    """
    from expectations import suites  # imports Great Expectations, which takes 2 s

    training = training_table.assign(
        in_test=training_table["digest"].isin(test_table["digest"]),
        near_test=training_table["near_digest"].isin(test_table["near_digest"]),
    )
    return _judged([(suites.training_images(), training), (suites.test_images(), test_table)])


def validate_batch(
    table: "pd.DataFrame",
    *,
    accepted: NDArray[np.int64],
    holdout: "pd.DataFrame",
    reference: ReferenceProfile | None = None,
) -> ValidationReport:
    """Validate an arriving batch, alone and against the accepted images and the holdout.

    `table` and `holdout` come from `image_table`; `accepted`, int64 (M,), are the digests of all
    accepted images. The boolean column `champion_contradicts`, if `table` has it, marks the images
    whose label the champion contradicts (see `expectations.champion_view`). The report's `skipped`
    names the parts that cannot be judged.
    """
    from expectations import suites  # imports Great Expectations, which takes 2 s

    joined = table.assign(
        in_accepted=table["digest"].isin(accepted),
        in_holdout=table["digest"].isin(holdout["digest"]),
        near_holdout=table["near_digest"].isin(holdout["near_digest"]),
    )
    with_champion = "champion_contradicts" in joined
    pairs = [(suites.arriving_images(len(table), with_champion=with_champion), joined)]
    skipped = []
    if len(table) < suites.FEWEST_ARRIVING:
        skipped.append(
            "what holds for images together, as that they are upright and rightly labelled: "
            f"there are {len(table)}, expected at least {suites.FEWEST_ARRIVING}"
        )
    elif not with_champion:
        skipped.append("the champion's view of the labels: no champion was asked")
    if reference is None:
        skipped.append("the distribution: no reference profile was given")
    elif len(table) < FEWEST_FOR_DRIFT:
        skipped.append(
            f"the distribution: {len(table)} images are too few to compare with accepted ones, "
            f"expected at least {FEWEST_FOR_DRIFT}"
        )
    else:
        # Drift has a table and a suite of its own: one row a batch instead of one row an image.
        drift = drift_table(table, reference)
        pairs.append((suites.arriving_distribution(reference.features), drift))
    return _judged(pairs, tuple(skipped))


def _judged(
    pairs: "list[tuple[ExpectationSuite, pd.DataFrame]]", skipped: tuple[str, ...] = ()
) -> ValidationReport:
    """Validate each table by its suite in a context in memory, without any network access."""
    import great_expectations as gx
    from great_expectations.data_context.types.base import (
        DataContextConfig,
        InMemoryStoreBackendDefaults,
        ProgressBarsConfig,
    )

    configuration = DataContextConfig(
        store_backend_defaults=InMemoryStoreBackendDefaults(init_temp_docs_sites=False),
        progress_bars=ProgressBarsConfig(globally=False),
        analytics_enabled=False,
    )
    context = gx.get_context(mode="ephemeral", project_config=configuration)
    frames = context.data_sources.add_pandas("memory")
    findings = []
    raw = {}
    for suite, table in pairs:
        definition = frames.add_dataframe_asset(suite.name).add_batch_definition_whole_dataframe(
            "all"
        )
        batch = definition.get_batch({"dataframe": table})
        result = _plain(batch.validate(suite).to_json_dict())
        raw[suite.name] = result
        findings += [_finding(suite.name, single) for single in result["results"]]
    return ValidationReport(findings=tuple(findings), skipped=skipped, raw=raw)


def _plain(value: Any) -> Any:
    """Return `value` in JSON types: Python scalars for NumPy's, None for NaN and infinity."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _finding(suite: str, single: dict[str, Any]) -> Finding:
    """Return the finding of one result of Great Expectations."""
    configuration = single["expectation_config"]
    result = single["result"]
    # `batch_id` is an id that Great Expectations adds, not a bound.
    bounds = {key: value for key, value in configuration["kwargs"].items() if key != "batch_id"}
    failure = _failure(single["exception_info"])
    return Finding(
        suite=suite,
        expectation=configuration["type"],
        column=bounds.pop("column", None),
        bounds=bounds,
        # An expectation that could not be evaluated refuses the data, whatever its severity.
        severity="critical" if failure else configuration["severity"],
        description=configuration.get("description", ""),
        success=single["success"],
        observed=failure or _observed(configuration["type"], result),
        expected=_expected(bounds),
        rows=tuple(result.get("partial_unexpected_index_list") or ()),
    )


def _failure(exception_info: dict[str, Any]) -> str:
    """Return the error in evaluating an expectation; an empty string if there was none.

    `exception_info` is one record, or a mapping of records, one for each metric that failed.
    """
    records = exception_info.values() if "raised_exception" not in exception_info else ()
    for record in [exception_info, *records]:
        if record.get("raised_exception"):
            return f"an error in evaluating it ({record['exception_message'].strip()})"
    return ""


def _observed(expectation: str, result: dict[str, Any]) -> str:
    if "unexpected_count" not in result:  # on the whole column or table, not on its rows
        value = result["observed_value"]
        return "nothing that can be measured" if value is None else _number(value)
    count = f"{result['unexpected_count']} of {result['element_count']}"
    if expectation == "expect_column_values_to_be_unique":
        return f"{count} repeated"
    # The keys of a dict are the distinct values in their order of occurrence.
    values = dict.fromkeys(_number(value) for value in result["partial_unexpected_list"])
    shown = f" ({', '.join(list(values)[:_SHOWN])})" if values else ""
    return f"{count} outside{shown}"


def _expected(bounds: dict[str, Any]) -> str:
    low = bounds.get("min_value")
    high = bounds.get("max_value", bounds.get("threshold"))
    if "value_set" in bounds:
        phrase = " or ".join(map(str, bounds["value_set"]))
    elif low is not None and high is not None:
        phrase = f"{_number(low)} to {_number(high)}"
    elif low is not None:
        phrase = f"at least {_number(low)}"
    elif high is not None:
        phrase = f"at most {_number(high)}"
    else:  # the only expectation without bounds is the one on unique values
        phrase = "no value twice"
    return f"{phrase} in at least {bounds['mostly']:.0%}" if "mostly" in bounds else phrase


def _number(value: Any) -> str:
    """Format a number briefly: four significant digits, enough to compare it with its bound."""
    if isinstance(value, float):
        return f"{value:.4g}" if value != round(value) else f"{value:.0f}"
    return str(value)
