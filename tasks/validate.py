"""Validate a snapshot, so that bad data is rejected before any compute is spent on it."""

import json

from prefect import get_run_logger

from expectations.image_table import image_table
from expectations.report_page import render_report
from expectations.validation import validate
from tasks.datasets.snapshots import read_split
from tasks.records import RejectedSnapshot, Snapshot, ValidatedSnapshot
from tasks.registry.fingerprint import digest_code
from tasks.services.s3 import Store
from tasks.services.step import step


def validation_folder(snapshot: Snapshot) -> str:
    """Return the folder of the verdict on a snapshot; changed expectations have another."""
    judge = digest_code("expectations")[:16]
    return f"datasets/{snapshot.dataset}/validations/{snapshot.digest}-{judge}"


@step
def validate_snapshot(snapshot: Snapshot) -> ValidatedSnapshot | RejectedSnapshot:
    """Validate both splits by their suites, store the result in S3, and return the verdict.

    One failed critical expectation rejects it; other failures are warnings. A snapshot that passed
    the same expectations before is not validated again.
    """
    logger = get_run_logger()
    store = Store(snapshot.store)
    folder = validation_folder(snapshot)
    passed = f"{folder}/passed.json"
    refused = f"{folder}/refused.json"
    if store.has(passed):
        logger.info("these expectations have passed this snapshot before")
        return ValidatedSnapshot.model_validate_json(store.get(passed))
    train = read_split(snapshot, "train")
    test = read_split(snapshot, "test")
    report = validate(
        image_table(train.images, train.labels), image_table(test.images, test.labels)
    )
    store.put(f"{folder}/results.json", json.dumps(report.raw).encode())
    title = f"Snapshot {snapshot.digest[:12]} of {snapshot.dataset}"
    images = {"training images": train.images, "test images": test.images}
    page = store.put(f"{folder}/report.html", render_report(report, title, images).encode())
    warnings = [finding.sentence for finding in report.warnings]
    for sentence in warnings:
        logger.warning(sentence)
    if failures := [finding.sentence for finding in report.critical]:
        rejected = RejectedSnapshot(snapshot=snapshot, report=page, failures=failures)
        store.put(refused, rejected.model_dump_json(indent=1).encode())
        return rejected
    logger.info("%d expectations hold", len(report.findings) - len(warnings))
    validated = ValidatedSnapshot(
        snapshot=snapshot, report=page, expectations=len(report.findings), warnings=warnings
    )
    # Last: it makes the snapshot count as passed, so report and results must be there.
    store.put(passed, validated.model_dump_json(indent=1).encode())
    return validated
