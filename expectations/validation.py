"""Run the suites on image tables and say in plain sentences what failed."""

import math
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from expectations.reference import ReferenceProfile, drift_table

if TYPE_CHECKING:
    import pandas as pd
    from great_expectations import ExpectationSuite

FEWEST_FOR_DRIFT = 500
"""Chance alone gives 100 images a population stability index of about 0.1, and 500 of 0.02."""

_SHOWN = 5  # offending values named in a sentence


class Finding(BaseModel, frozen=True, extra="forbid"):
    """What one expectation found.

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
        """Name the suite, the expectation and its column, what was observed and the bound."""
        return (
            f"{self.suite}: {self.expectation}({self.column or ''}): "
            f"observed {self.observed}, expected {self.expected}"
        )


class ValidationReport(BaseModel, frozen=True, extra="forbid"):
    """What all suites found; `raw` holds Great Expectations' own results by suite, as JSON does.

    `skipped` says in a sentence each what could not be judged, and why.
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
    """Judge both splits, each by its own suite, and training images that recur among test images.

    Both tables come from `image_table` and are not changed.
    """
    from expectations import suites

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
    """Judge an arriving batch by itself, and against what was accepted and what is held out.

    `table` and `holdout` come from `image_table`; `accepted` are the digests of all accepted
    images. The boolean column `champion_contradicts`, if `table` has it, says where the champion is
    sure of another label. What cannot be judged is named in `skipped`.
    """
    from expectations import suites

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
        drift = drift_table(table, reference)
        pairs.append((suites.arriving_distribution(reference.features), drift))
    return _judged(pairs, tuple(skipped))


def _judged(
    pairs: "list[tuple[ExpectationSuite, pd.DataFrame]]", skipped: tuple[str, ...] = ()
) -> ValidationReport:
    """Validate each table by its suite in a context that lives in memory and asks no network."""
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
    findings, raw = [], {}
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
    """Return `value` as JSON can hold it: no NumPy scalar, and None for what is not finite."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _finding(suite: str, single: dict[str, Any]) -> Finding:
    """Turn one result of Great Expectations into words."""
    configuration, result = single["expectation_config"], single["result"]
    bounds = {key: value for key, value in configuration["kwargs"].items() if key != "batch_id"}
    failure = _failure(single["exception_info"])
    return Finding(
        suite=suite,
        expectation=configuration["type"],
        column=bounds.pop("column", None),
        bounds=bounds,
        # What cannot be judged is not accepted.
        severity="critical" if failure else configuration["severity"],
        description=configuration.get("description", ""),
        success=single["success"],
        observed=failure or _observed(configuration["type"], result),
        expected=_expected(bounds),
        rows=tuple(result.get("partial_unexpected_index_list") or ()),
    )


def _failure(exception_info: dict[str, Any]) -> str:
    """Return why an expectation could not be evaluated, or nothing.

    The information is one record, or one for each metric that failed.
    """
    records = exception_info.values() if "raised_exception" not in exception_info else ()
    for record in [exception_info, *records]:
        if record.get("raised_exception"):
            return f"an error in evaluating it ({record['exception_message'].strip()})"
    return ""


def _observed(expectation: str, result: dict[str, Any]) -> str:
    if "unexpected_count" not in result:
        value = result["observed_value"]
        return "nothing that can be measured" if value is None else _number(value)
    count = f"{result['unexpected_count']} of {result['element_count']}"
    if expectation == "expect_column_values_to_be_unique":
        return f"{count} repeated"
    values = dict.fromkeys(_number(value) for value in result["partial_unexpected_list"])
    shown = f" ({', '.join(list(values)[:_SHOWN])})" if values else ""
    return f"{count} outside{shown}"


def _expected(bounds: dict[str, Any]) -> str:
    low, high = bounds.get("min_value"), bounds.get("max_value", bounds.get("threshold"))
    if "value_set" in bounds:
        phrase = " or ".join(map(str, bounds["value_set"]))
    elif low is not None and high is not None:
        phrase = f"{_number(low)} to {_number(high)}"
    elif low is not None:
        phrase = f"at least {_number(low)}"
    elif high is not None:
        phrase = f"at most {_number(high)}"
    else:
        phrase = "no value twice"
    return f"{phrase} in at least {bounds['mostly']:.0%}" if "mostly" in bounds else phrase


def _number(value: Any) -> str:
    """Write a number as short as it stays exact enough to compare with its bound."""
    if isinstance(value, float):
        return f"{value:.4g}" if value != round(value) else f"{value:.0f}"
    return str(value)
