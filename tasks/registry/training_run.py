"""The MLflow run of a training: one for each flow run, which a resumed flow run resumes."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from prefect import get_run_logger, runtime

from mnist_cnn.digits import CLASSES, SIDE
from tasks.services.mlflow import client

if TYPE_CHECKING:
    from mlflow.entities import Run

    from mnist_cnn.model import DigitCNN
    from mnist_cnn.training import EpochMetrics

FLOW_RUN_TAG = "prefect.flow_run_id"
SUPERSEDED = "superseded"
"""Tag of an MLflow run that its flow run has replaced by another; its value is the reason."""


class TrainingRun:
    """An open MLflow run, to which a training is logged."""

    def __init__(self, run: "Run", known_steps: set[int]) -> None:
        self.id: str = run.info.run_id
        self._known_steps = known_steps

    def log_epoch(self, metrics: "EpochMetrics") -> None:
        """Log the metrics of an epoch, without those that were not measured; returns at once."""
        import mlflow

        # A resume repeats the steps after its checkpoint. MLflow would keep both values.
        if metrics.step in self._known_steps:
            return
        figures = {
            "train_loss": metrics.loss,
            "train_accuracy": metrics.accuracy,
            "images_per_second": metrics.images_per_second,
            "validation_loss": metrics.validation_loss,
            "validation_accuracy": metrics.validation_accuracy,
        }
        measured = {name: value for name, value in figures.items() if value is not None}
        mlflow.log_metrics(measured, step=metrics.step, synchronous=False)

    def log_figures(self, figures: Mapping[str, float]) -> None:
        """Log figures of the whole training, by name."""
        import mlflow

        mlflow.log_metrics(dict(figures))

    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run."""
        import mlflow

        mlflow.set_tags(dict(tags))

    def log_model(self, model: "DigitCNN") -> str:
        """Log the model, as ONNX too, and return its address."""
        _log_onnx(model)
        return _log_exported(model)


@contextmanager
def training_run(
    experiment: str, earlier: "Run | None", tags: Mapping[str, str], params: Mapping[str, str]
) -> Iterator[TrainingRun]:
    """Open the MLflow run of this flow run, or open `earlier` again, and end it afterwards."""
    import mlflow

    known_steps = _logged_steps(earlier)
    mlflow.set_experiment(experiment)
    with mlflow.start_run(
        earlier.info.run_id if earlier else None,
        run_name=runtime.flow_run.name,
        log_system_metrics=True,
    ) as run:
        mlflow.set_tags({FLOW_RUN_TAG: runtime.flow_run.id, **tags})
        mlflow.log_params(dict(params))
        yield TrainingRun(run, known_steps)
        # The epochs were logged asynchronously. Wait for them: a run that has ended is complete.
        mlflow.flush_async_logging()


def find_earlier_run(experiment: str, params: Mapping[str, str], snapshot: str) -> "Run | None":
    """Return the MLflow run of an earlier attempt of this flow run, to be resumed; None without.

    One whose parameters or data were others is superseded: MLflow refuses to overwrite a parameter,
    and one run must not mix two data sets.
    """
    import mlflow

    runs: list[Run] = mlflow.search_runs(
        [mlflow.set_experiment(experiment).experiment_id],  # made by the first run of a data set
        filter_string=f"tags.`{FLOW_RUN_TAG}` = '{runtime.flow_run.id}'",
        output_format="list",
    )
    earlier = next((run for run in runs if SUPERSEDED not in run.data.tags), None)
    if earlier and (changed := _changes(earlier, params, snapshot)):
        _supersede(earlier, changed)
        return None
    return earlier


def logged_model(run: "Run") -> str | None:
    """Return the address of the model that an earlier attempt has logged, if it was finished."""
    if run.info.status != "FINISHED" or not (run.outputs and run.outputs.model_outputs):
        return None
    return f"models:/{run.outputs.model_outputs[0].model_id}"


def _changes(earlier: "Run", params: Mapping[str, str], snapshot: str) -> list[str]:
    """Return the names of differences from an earlier attempt: the data, or parameters.

    For a model that is finished, only the data counts.
    """
    known = earlier.data.params
    others = sorted(name for name in {*params, *known} if params.get(name) != known.get(name))
    if not known or logged_model(earlier):  # without parameters it died before it logged any
        others = []
    same_data = earlier.data.tags.get("snapshot", snapshot) == snapshot
    return others if same_data else ["snapshot", *others]


def _supersede(run: "Run", changed: list[str]) -> None:
    """End an MLflow run that cannot be resumed; log the reason and tag the run with it."""
    why = (
        f"another MLflow run of the flow run {runtime.flow_run.id} takes its place: when that was "
        f"resumed, it had another {', '.join(changed)} than before"
    )
    get_run_logger().warning("the MLflow run %s ends: %s", run.info.run_id, why)
    if run.info.status != "FINISHED":
        client().set_terminated(run.info.run_id, "KILLED")
    client().set_tag(run.info.run_id, SUPERSEDED, why)


def _logged_steps(run: "Run | None") -> set[int]:
    """Return the steps whose metrics an earlier attempt has logged to MLflow."""
    if run is None:
        return set()
    return {metric.step for metric in client().get_metric_history(run.info.run_id, "train_loss")}


def _log_onnx(model: "DigitCNN") -> None:
    """Log the model as ONNX too, the fastest format for predicting single images."""
    import mlflow

    from mnist_cnn.training.onnx_graph import to_onnx

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        file.write_bytes(to_onnx(model))
        mlflow.log_artifact(str(file), "onnx")


def _log_exported(model: "DigitCNN") -> str:
    """Log the model as an exported graph and return its address.

    The file holds tensors and a graph, and runs no code when it is loaded. Batch normalisation is
    folded into the convolutions, which saves time and changes only rounding.
    """
    import mlflow.pytorch
    import torch
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    info = mlflow.pytorch.log_model(
        # The exporter doubts any other memory format than contiguous.
        model.folded().to(memory_format=torch.contiguous_format),
        name="model",
        serialization_format="pt2",
        signature=ModelSignature(
            Schema([TensorSpec(np.dtype("uint8"), (-1, SIDE, SIDE))]),
            Schema([TensorSpec(np.dtype("float32"), (-1, CLASSES))]),
        ),
        # Two images: from a batch of one, the exporter would fix the batch size at one.
        input_example=np.zeros((2, SIDE, SIDE), np.uint8),
        # Without them, MLflow infers the requirements in a subprocess, which takes 10 s.
        pip_requirements=[f"torch=={installed('torch')}"],
    )
    return str(info.model_uri)
