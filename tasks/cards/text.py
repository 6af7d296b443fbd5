"""The text of the model card and the data card, in the Hugging Face form."""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from huggingface_hub import DatasetCardData, EvalResult, ModelCardData

from expectations.reference import WORTH_A_LOOK, Change
from mnist_cnn.evaluation import Evaluation
from mnist_cnn.evaluation.figures import SURE
from mnist_cnn.promotion import Decision
from mnist_cnn.training import PROCEDURE
from tasks.datasets.catalog import entry_of
from tasks.records import SPLITS, ModelVersion, Snapshot, ValidatedSnapshot
from tasks.services.markdown import render

if TYPE_CHECKING:
    from tasks.services.mlflow import Run

PICTURES = (
    "confusion",
    "factors",
    "slices",
    "reliability",
    "errors",
    "corruptions",
    "examination",
)
"""Pictures of a model card."""

_ROLES = ("candidate", "champion", "previous")


def write_card(
    validated: ValidatedSnapshot,
    measured: Mapping[str, Evaluation],
    decision: Decision,
    version: ModelVersion,
    run: "Run",
    pages: Mapping[str, str],
    created: datetime,
) -> str:
    """Return the model card as Markdown with its metadata block in the model-index form.

    `measured` holds "candidate" and, where there were any, "champion" and "previous". `run` is the
    MLflow run of the training. `pages` are addresses for a reader of the card, relative or http(s):
    of each of `PICTURES`, "run", "flow run", "data card" and "evaluation".
    """
    from mnist_cnn.evaluation.corruptions import CORRUPTIONS

    entry = entry_of(validated.snapshot.dataset)
    metadata = ModelCardData(
        license="apache-2.0",
        library_name="pytorch",
        pipeline_tag="image-classification",
        tags=["mnist", "digits", "image-classification"],
        datasets=[entry.hub_id],
        metrics=["accuracy", "f1", "brier_score"],
        model_name=f"{version.name} version {version.version}",
        eval_results=_results(validated.snapshot, measured["candidate"], version, pages["run"]),
    )
    compared = {
        f"{role} ({measured[role].model.rpartition('/')[2]})": measured[role]
        for role in _ROLES[1:]
        if role in measured
    }
    return render(
        Path(__file__).with_name("model_card.md"),
        card_data=metadata.to_yaml(),
        snapshot=validated.snapshot,
        entry=entry,
        candidate=measured["candidate"],
        others=compared,
        compared={f"this version ({version.version})": measured["candidate"]} | compared,
        decision=decision,
        version=version,
        run=run,
        machine=json.loads(run.data.tags["machine"]),
        started=datetime.fromtimestamp(run.info.start_time / 1000, UTC),
        pages=pages,
        created=created,
        procedure=PROCEDURE,
        corruptions=CORRUPTIONS,
        sure=SURE,
        installed=installed,
        linked=_linked,
        decimal=_decimal,
    )


def write_data_card(
    validated: ValidatedSnapshot, changes: Sequence[Change], created: datetime
) -> str:
    """Return the data card of a snapshot as Markdown with its metadata block.

    `changes` are those from the base data set; none if the snapshot is the base.
    """
    snapshot = validated.snapshot
    entry = entry_of(snapshot.dataset)
    metadata = DatasetCardData(
        license=entry.licence,
        task_categories=["image-classification"],
        pretty_name=snapshot.dataset,
        tags=["digits", "handwriting"],
    )
    return render(
        Path(__file__).with_name("data_card.md"),
        card_data=metadata.to_yaml(),
        validated=validated,
        snapshot=snapshot,
        entry=entry,
        splits=SPLITS,
        changes=changes,
        limit=WORTH_A_LOOK,
        created=created,
    )


def _results(
    snapshot: Snapshot, evaluation: Evaluation, version: ModelVersion, run_page: str
) -> list[EvalResult]:
    """Return the entries of the model index, clean figures first, then every condition."""
    metrics = [
        ("accuracy", "Accuracy", evaluation.accuracy),
        ("f1", "Macro F1", evaluation.macro_f1),
        ("brier_score", "Brier score", evaluation.calibration.brier),
        ("loss", "Cross entropy, nats", evaluation.loss),
        ("ece", "Expected calibration error", evaluation.calibration.expected_error),
    ]
    metrics += [
        ("accuracy", f"Accuracy, {c.corruption} at {c.strength:g} {c.unit}", c.accuracy)
        for c in evaluation.conditions
        if c.accuracy is not None
    ]
    return [
        EvalResult(
            task_type="image-classification",
            task_name="Image Classification",
            dataset_type=entry_of(snapshot.dataset).hub_id,
            dataset_name=snapshot.dataset,
            dataset_split="test",
            dataset_revision=snapshot.digest,
            metric_type=kind,
            metric_name=name,
            metric_value=value,
            source_name=f"MLflow run {version.run_id}",
            source_url=run_page,
        )
        for kind, name, value in metrics
    ]


def _linked(source: str) -> str:
    """Return a citation whose arXiv number or DOI is a link."""
    # An arXiv number ends in a digit, so a full stop after it stays out.
    linked = re.sub(r"arXiv:([\d.]+\d)", r"[\g<0>](https://arxiv.org/abs/\1)", source)
    return re.sub(r"doi:([\w./]+)", r"[\g<0>](https://doi.org/\1)", linked)


def _decimal(value: float) -> str:
    """Return three significant digits, never in the form 5e-05."""
    return np.format_float_positional(value, precision=3, unique=False, fractional=False, trim="-")
