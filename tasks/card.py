"""Write the model card and the data card in the Hugging Face form."""

from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData

from mnist_cnn.card import (
    DATA_TEMPLATE,
    MODEL_TEMPLATE,
    CardFacts,
    DataFacts,
    describe,
    describe_data,
)


def write_card(facts: CardFacts) -> str:
    """Return the model card as Markdown with its metadata block in the model-index form."""
    metadata = ModelCardData(
        license="apache-2.0",
        library_name="pytorch",
        pipeline_tag="image-classification",
        tags=["mnist", "digits", "image-classification"],
        datasets=[facts.data.hub_id],
        metrics=["accuracy", "f1", "brier_score"],
        model_name=f"{facts.name} version {facts.version}",
        eval_results=_results(facts),
    )
    card = ModelCard.from_template(
        metadata, template_path=str(MODEL_TEMPLATE), facts=facts, text=describe(facts)
    )
    return f"{card}\n"


def _results(facts: CardFacts) -> list[EvalResult]:
    evaluation = facts.candidate
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
            dataset_type=facts.data.hub_id,
            dataset_name=facts.data.name,
            dataset_split="test",
            dataset_revision=facts.data.digest,
            metric_type=kind,
            metric_name=name,
            metric_value=value,
            source_name=f"MLflow run {facts.run_id}",
            source_url=facts.run_url,
        )
        for kind, name, value in metrics
    ]


def write_data_card(data: DataFacts) -> str:
    """Return the data card of a snapshot as Markdown with its metadata block."""
    metadata = DatasetCardData(
        license=data.licence,
        task_categories=["image-classification"],
        pretty_name=data.name,
        tags=["digits", "handwriting"],
    )
    card = DatasetCard.from_template(
        metadata, template_path=str(DATA_TEMPLATE), data=data, text=describe_data(data)
    )
    return f"{card}\n"
