"""Measure candidate and champion afresh on the same test images."""

import io
import os
from typing import TYPE_CHECKING

from prefect import get_run_logger, runtime, task

from mnist_cnn.digits import Digits
from mnist_cnn.evaluation import Evaluation, evaluate, predict
from tasks.records import Snapshot
from tasks.storage import Store, read_split, worth_another_try

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn


class ModelUnusable(RuntimeError):
    """A model that the registry offers cannot be loaded or does not classify digits."""


@task(retries=2, retry_delay_seconds=[2, 10], retry_condition_fn=worth_another_try)
def evaluate_model(model: str, role: str, snapshot: Snapshot) -> Evaluation:
    """Load `model`, classify the snapshot's test split and store the outcome of every image.

    `role` is "candidate" or "champion". Raises ModelUnusable for a model that does not load.
    """
    digits = read_split(snapshot, "test")
    network = load_model(model)
    try:
        probabilities = predict(network, digits.images)
    except (ValueError, RuntimeError) as error:
        raise ModelUnusable(f"{role} {model} cannot classify the test split: {error}") from error
    outcomes = Store(snapshot.store).put(
        f"runs/{runtime.flow_run.id}/{role}-outcomes.parquet", _outcomes(probabilities, digits)
    )
    measured = evaluate(
        probabilities, digits, model=model, snapshot=snapshot.digest, outcomes=outcomes
    )
    get_run_logger().info("%s %s: accuracy %.4f", role, model, measured.accuracy)
    return measured


def load_model(model: str) -> "nn.Module":
    """Load a model from MLflow with unpickling forbidden; it maps uint8 (N, 28, 28) to logits."""
    import mlflow.pytorch  # noqa: PLC0415 - 2 s to import
    from mlflow.exceptions import MlflowException  # noqa: PLC0415

    os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
    try:
        network: nn.Module = mlflow.pytorch.load_model(model)
    except (MlflowException, OSError, RuntimeError) as error:
        raise ModelUnusable(
            f"{model} does not load ({error}); its artifact is gone or damaged: roll back to a "
            "version that loads, or retrain"
        ) from error
    return network


def _outcomes(probabilities: "NDArray[np.float32]", digits: Digits) -> bytes:
    """Write label and probabilities of each image, in the order of the test split, as Parquet."""
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.parquet as pq  # noqa: PLC0415

    columns = {f"p{digit}": probabilities[:, digit] for digit in range(probabilities.shape[1])}
    content = io.BytesIO()
    pq.write_table(pa.table({"label": digits.labels, **columns}), content, compression="zstd")
    return content.getvalue()
