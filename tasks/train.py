"""Train a candidate, and keep it with its metrics and its origin in an MLflow run."""

from importlib.metadata import version as installed
from typing import TYPE_CHECKING
from uuid import UUID

import numpy as np
from prefect import get_run_logger, runtime, task
from prefect.artifacts import create_progress_artifact, update_progress_artifact

from mnist_cnn.digits import CLASSES, SIDE
from mnist_cnn.training import Device, EpochMetrics, TrainingConfig, train
from tasks.records import Candidate, ValidatedSnapshot
from tasks.storage import read_split, worth_another_try

if TYPE_CHECKING:
    from mnist_cnn.model import DigitCNN

FLOW_RUN_TAG = "prefect.flow_run_id"


@task(retries=2, retry_delay_seconds=[2, 10], retry_condition_fn=worth_another_try)
def train_model(
    validated: ValidatedSnapshot, config: TrainingConfig, device: Device = "auto"
) -> Candidate:
    """Train on the snapshot's training split and store the model without pickle.

    A repeat within the same flow run goes on in the same MLflow run.
    """
    import mlflow  # noqa: PLC0415 - 2 s to import

    logger = get_run_logger()
    snapshot = validated.snapshot
    digits = read_split(snapshot, "train")
    mlflow.set_experiment(snapshot.model_name)
    progress = create_progress_artifact(0.0, key="training", description="Training has begun.")
    assert isinstance(progress, UUID)
    with mlflow.start_run(_earlier_run(snapshot.model_name), run_name=runtime.flow_run.name) as run:
        mlflow.set_tags(
            {
                FLOW_RUN_TAG: runtime.flow_run.id,
                "snapshot": snapshot.digest,
                "validation": validated.report,
            }
        )
        mlflow.log_params(config.model_dump())

        def on_epoch(metrics: EpochMetrics) -> None:
            mlflow.log_metrics(
                {
                    "train_loss": metrics.loss,
                    "train_accuracy": metrics.accuracy,
                    "images_per_second": metrics.images_per_second,
                },
                step=metrics.epoch,
            )
            sentence = (
                f"epoch {metrics.epoch} of {config.epochs}: loss {metrics.loss:.4f}, "
                f"{metrics.images_per_second:,.0f} images/s, {metrics.seconds_left:.0f} s left"
            )
            logger.info(sentence)
            update_progress_artifact(progress, 100 * metrics.epoch / config.epochs, sentence)

        training = train(digits, config, device, on_epoch)
        mlflow.log_metric("training_seconds", training.seconds)
        mlflow.set_tag("device", training.device)
        model = _log_model(training.model)
    logger.info("trained in %.1f s on %s", training.seconds, training.device)
    return Candidate(
        name=snapshot.model_name, run_id=run.info.run_id, model=model, snapshot=snapshot.digest
    )


def _earlier_run(experiment: str) -> str | None:
    """Return the MLflow run that an earlier attempt of this flow run began."""
    import mlflow  # noqa: PLC0415

    runs = mlflow.search_runs(
        experiment_names=[experiment],
        filter_string=f"tags.`{FLOW_RUN_TAG}` = '{runtime.flow_run.id}'",
        output_format="list",
    )
    return runs[0].info.run_id if runs else None


def _log_model(model: "DigitCNN") -> str:
    """Store the exported graph; it holds tensors and a graph, and runs no code when it is loaded.

    The requirements are given because inferring them takes a subprocess and 10 s; the example has
    two images because the exporter would freeze a batch of one.
    """
    import mlflow.pytorch  # noqa: PLC0415
    from mlflow.models import ModelSignature  # noqa: PLC0415
    from mlflow.types import Schema, TensorSpec  # noqa: PLC0415

    info = mlflow.pytorch.log_model(
        model,
        name="model",
        serialization_format="pt2",
        signature=ModelSignature(
            Schema([TensorSpec(np.dtype("uint8"), (-1, SIDE, SIDE))]),
            Schema([TensorSpec(np.dtype("float32"), (-1, CLASSES))]),
        ),
        input_example=np.zeros((2, SIDE, SIDE), np.uint8),
        pip_requirements=[f"torch=={installed('torch')}"],
    )
    return str(info.model_uri)
