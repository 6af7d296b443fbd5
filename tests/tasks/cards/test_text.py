import json
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from huggingface_hub import DatasetCard, ModelCard
from jinja2 import UndefinedError
from mlflow.entities import Metric, Param, Run, RunData, RunInfo, RunTag
from PIL import Image
from torch import nn

from expectations.reference import Change
from mnist_cnn.digits import CLASSES, SIDE, Digits
from mnist_cnn.evaluation import Evaluation, Outcomes, evaluate
from mnist_cnn.evaluation.cost import measure_size, measure_times
from mnist_cnn.evaluation.shift import measure_shift
from mnist_cnn.model import DigitCNN
from mnist_cnn.promotion import Decision
from mnist_cnn.promotion.decision import Check
from mnist_cnn.training import TrainingConfig
from tasks.cards.text import PICTURES, write_card, write_data_card
from tasks.records import ModelVersion, Shard, Snapshot, ValidatedSnapshot

SECTIONS = """
## Model Details
### Model Description
### Model Sources
## Uses
### Primary Intended Use
### Primary Intended Users
### Out-of-Scope Use
## Bias, Risks, and Limitations
### Bias
### Risks
### Recommendations
## How to Get Started with the Model
## Training Details
### Training Data
### Training Procedure
#### Preprocessing
#### Training Hyperparameters
#### Speeds, Sizes, Times
## Evaluation
### Testing Data, Factors & Metrics
#### Testing Data
#### Factors
#### Metrics
### Results
#### Summary
## Model Examination
## Environmental Impact
## Technical Specifications
### Model Architecture and Objective
### Compute Infrastructure
#### Hardware
#### Software
## Citation
## More Information
## Model Card Authors
## Model Card Contact
""".strip().splitlines()
"""The sections of the card whose blanks this project fills, in order."""

Splits = tuple[Digits, Digits]

NOW = datetime(2026, 11, 22, 6, 30, tzinfo=UTC)


@dataclass(frozen=True)
class Records:
    """What a card is written from."""

    validated: ValidatedSnapshot
    measured: dict[str, Evaluation]
    decision: Decision
    version: ModelVersion
    run: Run
    pages: dict[str, str]
    created: datetime

    def card(self) -> str:
        return write_card(**vars(self))


@pytest.fixture(scope="module")
def records(splits: Splits, outcomes: dict[str, Outcomes], reader: nn.Module) -> Records:
    shift = measure_shift(*splits)
    measured = {
        role: evaluate(
            outcomes[role],
            splits[1],
            model=f"models:/mnist-cnn/{version}",
            snapshot="5e" * 32,
            outcomes=f"s3://models/outcomes/{version}.npz",
            shift=shift,
            size=measure_size(reader, 31_415),
            times=measure_times(reader, splits[1].images, 1.5, 5),
        )
        for role, version in (("candidate", 8), ("champion", 7))
    }
    check = Check(
        name="accuracy floor",
        kind="floor",
        observed=0.99,
        threshold=0.98,
        passed=True,
        sentence="accuracy floor: 0.99 is at least 0.98",
    )
    return Records(
        validated=validated(splits),
        measured=measured,
        decision=Decision(
            verdict="promote",
            reason="accuracy is higher on the same images",
            checks=[check],
            comparisons=[],
            candidate="models:/mnist-cnn/8",
            champion="models:/mnist-cnn/7",
            snapshot="5e" * 32,
            test_split="7e" * 32,
            decisions=1,
            level=0.05,
        ),
        version=ModelVersion(
            name="mnist-cnn",
            version="8",
            run_id="0123abcd",
            model="models:/mnist-cnn/8",
            snapshot="5e" * 32,
        ),
        run=training_run(
            training_seconds=61.25, steps=300, energy_kwh=0.00123, emissions_g_co2e=0.456
        ),
        pages={name: f"pictures/{name}.png" for name in PICTURES}
        | {
            "run": "https://mlflow.example.org/#/experiments/1/runs/0123abcd",
            "flow run": "https://prefect.example.org/runs/flow-run/42",
            "data card": "data_card.md",
            "evaluation": "candidate_evaluation.json",
        },
        created=NOW,
    )


def training_run(**metrics: float) -> Run:
    """Return the MLflow run of a training, as `tasks.train` leaves it."""
    machine = {
        "processor": "Example CPU",
        "cores": 2,
        "memory_gib": 23.5,
        "python": "3.11.9",
        "accelerator": "",
        "codecarbon": "3.3.2",
        "cloud_provider": "",
        "region": "Spain",
        "method": "a constant power of the processor",
    }
    tags = {
        "architecture": str(DigitCNN()),
        "precision": "fp32",
        "device": "cpu",
        "machine": json.dumps(machine),
    }
    params = TrainingConfig().model_dump() | TrainingConfig().recipe().model_dump()
    start = int(NOW.timestamp() * 1000)
    return Run(
        RunInfo("0123abcd", "1", "a user", "FINISHED", start, None, "active"),
        RunData(
            metrics=[Metric(name, value, start, 0) for name, value in metrics.items()],
            params=[Param(name, str(value)) for name, value in params.items()],
            tags=[RunTag(name, value) for name, value in tags.items()],
        ),
    )


def validated(splits: Splits, parent: str | None = "4d" * 32) -> ValidatedSnapshot:
    train, test = (
        Shard(
            digest=digest * 32,
            images=len(split),
            labels=torch.bincount(torch.tensor(split.labels), minlength=CLASSES).tolist(),
            origin="an | archive",
        )
        for digest, split in zip(("a1", "b2"), splits, strict=True)
    )
    return ValidatedSnapshot(
        snapshot=Snapshot(
            dataset="digits",
            store="s3://data",
            digest="5e" * 32,
            train=[train],
            test=[test],
            parent=parent,
        ),
        report="s3://data/validations/5e/report.html",
        expectations=12,
        warnings=[],
    )


@pytest.fixture(scope="module")
def card(records: Records) -> str:
    return records.card()


def sections_of(card: str) -> dict[str, str]:
    prose = re.sub(r"```.*?```", lambda code: code[0].replace("#", "%"), card, flags=re.DOTALL)
    parts = re.split(r"^(#{2,4} .+)$", prose, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_section_is_there_in_order(card: str) -> None:
    assert list(sections_of(card)) == SECTIONS


def test_no_section_is_blank_and_none_holds_placeholder_text(card: str) -> None:
    sections = sections_of(card)
    for place, heading in enumerate(SECTIONS):
        below = SECTIONS[place + 1] if place + 1 < len(SECTIONS) else ""
        if not below.startswith(heading.split()[0] + "#"):  # a section of its own text
            assert len(sections[heading].strip()) > 15, heading
    assert not re.search(r"(?i)more information needed|optional\]|todo|\{\{|\}\}", card)
    assert not re.search(r"\b(nan|inf)\b|[|(:`] ?None ?[|)`]|None$", card, re.MULTILINE)


def test_a_value_that_is_missing_is_refused_not_left_blank(records: Records) -> None:
    run = training_run(training_seconds=61.25, steps=300)
    del run.data.tags["precision"]
    with pytest.raises(UndefinedError, match="precision"):
        replace(records, run=run).card()


def test_the_metadata_comes_back_as_the_results_that_were_measured(
    card: str, records: Records
) -> None:
    data = ModelCard(card).data
    results = {result.metric_name: result for result in data["eval_results"]}
    assert results["Accuracy"].metric_value == records.measured["candidate"].accuracy
    assert results["Macro F1"].metric_value == records.measured["candidate"].macro_f1
    assert len(results) == 5 + len(records.measured["candidate"].conditions)
    assert {r.dataset_revision for r in data["eval_results"]} == {"5e" * 32}
    assert {r.source_url for r in data["eval_results"]} == {records.pages["run"]}
    assert data["model_name"] == "mnist-cnn version 8"


def test_the_authors_of_this_code_stand_beside_those_of_the_card_that_it_follows(card: str) -> None:
    (developers,) = re.findall(r"\*\*Developed by:\*\* (.*)", card)
    assert developers.startswith("The authors of mnist-retraining, after a model card by Adrià")


def test_the_verdict_stands_above_the_first_section(card: str) -> None:
    head = card.split("## Model Details", maxsplit=1)[0]
    assert (
        "Verdict: **promote** (1 of 1 checks passed): accuracy is higher on the same images."
        in head
    )


def test_measured_figures_are_in_the_card(card: str, records: Records) -> None:
    evaluation = records.measured["candidate"]
    assert evaluation.size
    for figure in (
        f"{evaluation.accuracy * 100:.2f} (",
        f"{evaluation.calibration.brier:.4f} (",
        f"{evaluation.size.multiply_accumulates:,}",
        "31.4 kB",
        "61.2 s",
        "0.00123 kWh (an estimate",
        "0.456 gCO2e (an estimate)",
        *(f"{(result.accuracy or 0) * 100:.2f} %" for result in evaluation.conditions),
        *(f"{part.accuracy * 100:.2f} %" for part in evaluation.slices),
    ):
        assert figure in card, figure


def test_champions_stand_side_by_side(card: str, records: Records) -> None:
    assert "| this version (8) | champion (7) |" in card
    previous = records.measured["champion"].model_copy(update={"model": "models:/mnist-cnn/6"})
    three = replace(records, measured=records.measured | {"previous": previous}).card()
    assert "| this version (8) | champion (7) | previous (6) |" in three
    alone = replace(records, measured={"candidate": records.measured["candidate"]}).card()
    assert "There was no champion to compare with." in alone


def test_a_gap_is_stated_in_words(records: Records) -> None:
    conditions = list(records.measured["candidate"].conditions)
    conditions[0] = conditions[0].model_copy(
        update={"accuracy": None, "interval": None, "gap": "the corruption failed"}
    )
    candidate = records.measured["candidate"].model_copy(
        update={"conditions": conditions, "shift": None, "gaps": ["slant=-30: it failed"]}
    )
    measured = records.measured | {"candidate": candidate}
    run = training_run(training_seconds=61.25, steps=300)
    card = replace(records, measured=measured, run=run).card()
    assert "not measured: the corruption failed" in card
    assert "- slant=-30: it failed" in card
    assert "no training split was at hand" in card
    assert "not measured in this run" in card
    assert len(ModelCard(card).data["eval_results"]) == 5 + len(conditions) - 1


def test_the_data_card_says_what_is_in_the_snapshot(splits: Splits) -> None:
    drift = Change(feature="stroke_width", before=2.0, after=2.1, stability_index=0.0076)
    card = write_data_card(validated(splits), [drift], NOW)
    assert DatasetCard(card).data["license"] == "cc-by-4.0"
    for text in (
        r"an \| archive",
        "`" + "4d" * 32 + "`",
        "Verdict: **accepted**; 12 of 12",
        "0.0076",
        "The sample's digits are by 13 people",
    ):
        assert text in card
    first = write_data_card(validated(splits, parent=None), [], NOW)
    assert "none: the first snapshot" in first
    assert "nothing has arrived that could have drifted" in first


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # MLflow's own warnings are not what is tested
def test_the_snippet_runs_as_printed(
    card: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, splits: Splits
) -> None:
    address = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.chdir(tmp_path)
    mlflow.set_experiment("snippet")  # else that of another test, which this server has not
    torch.manual_seed(0)
    model = DigitCNN().eval()
    with mlflow.start_run():
        mlflow.pytorch.log_model(
            model,
            name="model",
            registered_model_name="mnist-cnn",
            pip_requirements=["torch"],
            # The exported graph needs none of our code to load; the example's batch of two
            # keeps the exporter from freezing a batch of one.
            serialization_format="pt2",
            input_example=np.zeros((2, SIDE, SIDE), np.uint8),
        )
    mlflow.MlflowClient().set_registered_model_alias("mnist-cnn", "champion", "1")
    Image.fromarray(splits[1].images[0]).save(tmp_path / "digit.png")
    snippet = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0]
    done = subprocess.run(
        [sys.executable, "-c", snippet], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with torch.inference_mode():
        answer = int(model(torch.tensor(splits[1].images[:1])).argmax())
    assert re.fullmatch(rf"{answer} with a confidence of \d+\.\d%\n", done.stdout)
