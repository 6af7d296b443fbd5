"""Refuse bad data before any compute is spent on it."""

import json

from prefect import get_run_logger, runtime, task

from expectations.image_table import image_table
from expectations.report_page import render_report
from expectations.validation import validate
from tasks.records import RejectedSnapshot, Snapshot, ValidatedSnapshot
from tasks.storage import Store, read_split, worth_another_try


@task(retries=2, retry_delay_seconds=[2, 10], retry_condition_fn=worth_another_try)
def validate_snapshot(snapshot: Snapshot) -> ValidatedSnapshot | RejectedSnapshot:
    """Judge both splits by their suites, store the result in S3, and pass or refuse the snapshot.

    Each failed critical expectation refuses it; the others are warnings.
    """
    logger = get_run_logger()
    train, test = read_split(snapshot, "train"), read_split(snapshot, "test")
    report = validate(
        image_table(train.images, train.labels), image_table(test.images, test.labels)
    )
    store = Store(snapshot.store)
    name = f"runs/{runtime.flow_run.id}/validation"
    store.put(f"{name}.json", json.dumps(report.raw).encode())
    page = store.put(f"{name}.html", render_report(report).encode())
    warnings = [finding.sentence for finding in report.warnings]
    for sentence in warnings:
        logger.warning(sentence)
    failures = [finding.sentence for finding in report.critical]
    if failures:
        return RejectedSnapshot(snapshot=snapshot, report=page, failures=failures)
    logger.info("%d expectations hold", len(report.findings) - len(warnings))
    return ValidatedSnapshot(
        snapshot=snapshot, report=page, expectations=len(report.findings), warnings=warnings
    )
