"""Validate a snapshot, so that bad data is rejected before any compute is spent on it."""

import json

from prefect import get_run_logger

from expectations.image_table import image_table
from expectations.report_page import render_report
from expectations.validation import validate
from tasks import keys
from tasks.datasets.snapshots import read_split
from tasks.records import RejectedSnapshot, Snapshot, ValidatedSnapshot
from tasks.registry.fingerprint import digest_code
from tasks.services.s3 import Store
from tasks.services.step import step

DECIDES = (
    "expectations/image_table.py",
    "expectations/reference.py",
    "expectations/suites.py",
    "expectations/validation.py",
    "mnist_cnn/digits.py",
    "mnist_cnn/record.py",
    "mnist_cnn/styles.py",
)
"""All of our code that a verdict depends on: what `validate` and `image_table` import."""


def validation_key(snapshot: Snapshot, name: str) -> str:
    """Return the key of a part of the verdict on a snapshot; changed expectations have another."""
    return keys.validation(snapshot.dataset, snapshot.digest, digest_code(*DECIDES)[:16], name)


@step
def validate_snapshot(snapshot: Snapshot) -> ValidatedSnapshot | RejectedSnapshot:
    """Validate both splits by their suites, store the result in S3, and return the verdict.

    One failed critical expectation rejects it; other failures are warnings. A snapshot that passed
    the same expectations before is not validated again.
    """
    logger = get_run_logger()
    store = Store(snapshot.store)
    passed = validation_key(snapshot, "passed.json")
    if store.has(passed):
        logger.info("these expectations have passed this snapshot before")
        return ValidatedSnapshot.model_validate_json(store.get(passed))
    train = read_split(snapshot, "train")
    test = read_split(snapshot, "test")
    report = validate(
        image_table(train.images, train.labels), image_table(test.images, test.labels)
    )
    store.put(validation_key(snapshot, "results.json"), json.dumps(report.raw).encode())
    title = f"Snapshot {snapshot.digest[:12]} of {snapshot.dataset}"
    images = {"training images": train.images, "test images": test.images}
    page = store.put(
        validation_key(snapshot, "report.html"), render_report(report, title, images).encode()
    )
    warnings = [finding.sentence for finding in report.warnings]
    for sentence in warnings:
        logger.warning(sentence)
    if failures := [finding.sentence for finding in report.critical]:
        rejected = RejectedSnapshot(snapshot=snapshot, report=page, failures=failures)
        content = rejected.model_dump_json(indent=1).encode()
        store.put(validation_key(snapshot, "refused.json"), content)
        return rejected
    logger.info("%d expectations hold", len(report.findings) - len(warnings))
    validated = ValidatedSnapshot(
        snapshot=snapshot, report=page, expectations=len(report.findings), warnings=warnings
    )
    # Last: it makes the snapshot count as passed, so report and results must be there.
    store.put(passed, validated.model_dump_json(indent=1).encode())
    return validated
