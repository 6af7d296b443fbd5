import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import jinja2
import mlflow
import numpy as np
import pytest
import torch
from huggingface_hub import DatasetCard, ModelCard
from PIL import Image
from pydantic import ValidationError
from torch import nn

from mnist_cnn.digits import CLASSES, SIDE, Digits
from mnist_cnn.evaluation import Outcomes, evaluate
from mnist_cnn.evaluation.cost import measure_size, measure_times
from mnist_cnn.evaluation.shift import measure_shift
from mnist_cnn.model import DigitCNN
from mnist_cnn.training import TrainingConfig
from tasks.cards.publish import write_card, write_data_card
from tasks.cards.text import (
    MODEL_TEMPLATE,
    PICTURES,
    CardFacts,
    CheckFact,
    DataFacts,
    DataPart,
    DriftFigure,
    EnergyFacts,
    HardwareFacts,
    Pictures,
    TrainingFacts,
    describe,
    table,
)

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


@pytest.fixture(scope="module")
def facts(splits: Splits, outcomes: dict[str, Outcomes], reader: nn.Module) -> CardFacts:
    shift = measure_shift(*splits)
    candidate, champion = (
        evaluate(
            outcomes[name],
            splits[1],
            model=f"models:/mnist-cnn/{version}",
            snapshot="5e" * 32,
            outcomes=f"s3://models/outcomes/{version}.npz",
            shift=shift,
            size=measure_size(reader, 31_415),
            times=measure_times(reader, splits[1].images, 1.5, 5),
        )
        for name, version in (("candidate", 8), ("champion", 7))
    )
    return CardFacts(
        name="mnist-cnn",
        version="8",
        model_uri="models:/mnist-cnn/8",
        champion_uri="models:/mnist-cnn@champion",
        created=NOW,
        developers=["Ada Example", "Grace Example"],
        contact="digits@example.org",
        repository="https://example.org/mnist",
        run_id="0123abcd",
        run_url="https://mlflow.example.org/#/experiments/1/runs/0123abcd",
        flow_run_url="https://prefect.example.org/runs/flow-run/42",
        data_card="data_card.md",
        evaluation="candidate_evaluation.json",
        pictures=Pictures(**{name: f"pictures/{name}.png" for name in PICTURES}),
        architecture=str(DigitCNN()),
        training=TrainingFacts(
            settings=TrainingConfig().model_dump(),
            procedure="AdamW under a one-cycle schedule.",
            precision="fp32",
            device="cpu",
            started=NOW,
            seconds=61.25,
            images=len(splits[0]),
            images_per_second=9876.0,
        ),
        hardware=HardwareFacts(processor="Example CPU", cores=2, memory_gib=23.5),
        software={"torch": "2.15.0", "mlflow": "3.17.2"},
        energy=EnergyFacts(
            kwh=0.00123,
            grams_co2e=0.456,
            hours=0.017,
            provider="none (own machine)",
            region="Spain",
            tool="codecarbon 3.3.2",
            method="a constant power of the processor",
        ),
        data=data_facts(splits),
        candidate=candidate,
        champion=champion,
        previous=None,
        verdict="promote",
        reason="accuracy is higher on the same images",
        checks=[CheckFact(name="accuracy floor", passed=True, sentence="0.99 is at least 0.98")],
    )


def data_facts(splits: Splits) -> DataFacts:
    counts = [torch.bincount(torch.tensor(s.labels), minlength=CLASSES).tolist() for s in splits]
    return DataFacts(
        name="digits",
        digest="5e" * 32,
        address="s3://data/snapshots/5e.json",
        created=NOW,
        parent="4d" * 32,
        parts=[
            DataPart(
                name="first", split="training", images=1438, source="an | archive", digest="a1"
            )
        ],
        training_labels=counts[0],
        test_labels=counts[1],
        validation_verdict="passed",
        validation_address="s3://data/validations/5e.json",
        expectations_met=12,
        expectations=12,
        drift=[DriftFigure(name="label distance", value=0.0076, limit=0.1, passed=True)],
        licence="cc-by-4.0",
        hub_id="uci/optical-recognition-of-handwritten-digits",
        writers="Thirteen people wrote them.",
    )


@pytest.fixture(scope="module")
def card(facts: CardFacts) -> str:
    return write_card(facts)


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


def test_the_template_uses_only_names_that_exist(facts: CardFacts) -> None:
    strict = jinja2.Template(MODEL_TEMPLATE.read_text("utf-8"), undefined=jinja2.StrictUndefined)
    assert strict.render(card_data="x: 1", facts=facts, text=describe(facts))


def test_the_metadata_comes_back_as_the_results_that_were_measured(
    card: str, facts: CardFacts
) -> None:
    data = ModelCard(card).data
    results = {result.metric_name: result for result in data.eval_results}
    assert results["Accuracy"].metric_value == facts.candidate.accuracy
    assert results["Macro F1"].metric_value == facts.candidate.macro_f1
    assert len(results) == 5 + len(facts.candidate.conditions)
    assert {r.dataset_revision for r in data.eval_results} == {facts.data.digest}
    assert {r.source_url for r in data.eval_results} == {facts.run_url}
    assert data.model_name == "mnist-cnn version 8"


def test_the_verdict_stands_above_the_first_section(card: str) -> None:
    head = card.split("## Model Details", maxsplit=1)[0]
    assert (
        "Verdict: **promote** (1 of 1 checks passed): accuracy is higher on the same images."
        in head
    )


def test_measured_figures_are_in_the_card(card: str, facts: CardFacts) -> None:
    evaluation = facts.candidate
    for figure in (
        f"{evaluation.accuracy * 100:.2f} (",
        f"{evaluation.calibration.brier:.4f} (",
        f"{evaluation.size.multiply_accumulates:,}",
        "31.4 kB",
        "61.2 s",
        "0.00123 kWh (an estimate",
        "0.456 gCO2e (an estimate)",
        *(f"{result.accuracy * 100:.2f} %" for result in evaluation.conditions),
        *(f"{part.accuracy * 100:.2f} %" for part in evaluation.slices),
    ):
        assert figure in card, figure


def test_champions_stand_side_by_side(card: str, facts: CardFacts) -> None:
    assert "| this version (8) | champion (7) |" in card
    previous = facts.champion.model_copy(update={"model": "models:/mnist-cnn/6"})
    three = write_card(facts.model_copy(update={"previous": previous}))
    assert "| this version (8) | champion (7) | previous (6) |" in three
    alone = write_card(facts.model_copy(update={"champion": None}))
    assert "There was no champion to compare with." in alone


def test_a_gap_is_stated_in_words(facts: CardFacts) -> None:
    conditions = list(facts.candidate.conditions)
    conditions[0] = conditions[0].model_copy(
        update={"accuracy": None, "interval": None, "gap": "the corruption failed"}
    )
    candidate = facts.candidate.model_copy(
        update={"conditions": conditions, "shift": None, "gaps": ["slant=-30: it failed"]}
    )
    card = write_card(facts.model_copy(update={"candidate": candidate, "energy": None}))
    assert "not measured: the corruption failed" in card
    assert "- slant=-30: it failed" in card
    assert "no training split was at hand" in card
    assert "not measured in this run" in card
    assert len(ModelCard(card).data.eval_results) == 5 + len(conditions) - 1


def test_a_misspelt_fact_is_refused(facts: CardFacts) -> None:
    with pytest.raises(ValidationError, match="versoin"):
        CardFacts(**{**dict(facts), "versoin": "8"})


def test_a_pipe_does_not_break_a_table() -> None:
    assert table(["a"], [["x|y\nz"]]).splitlines()[-1] == r"| x\|y z |"


def test_the_data_card_says_what_is_in_the_snapshot(splits: Splits) -> None:
    card = write_data_card(data_facts(splits))
    assert DatasetCard(card).data.license == "cc-by-4.0"
    for text in (
        r"an \| archive",
        "`" + "4d" * 32 + "`",
        "Verdict: **passed**; 12 of 12",
        "0.0076",
        "Thirteen people wrote them.",
    ):
        assert text in card
    first = write_data_card(data_facts(splits).model_copy(update={"parent": None, "drift": []}))
    assert "none: the first snapshot" in first
    assert "nothing has arrived that could have drifted" in first


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
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    done = subprocess.run(
        [sys.executable, "-c", snippet], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with torch.inference_mode():
        answer = int(model(torch.tensor(splits[1].images[:1])).argmax())
    assert re.fullmatch(rf"{answer} with a confidence of \d+\.\d%\n", done.stdout)
