"""Train a candidate, and log it with its metrics and its origin to an MLflow run."""

import json
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version as installed
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING
from uuid import UUID

import numpy as np
from prefect import get_run_logger, runtime
from prefect.artifacts import create_progress_artifact, update_progress_artifact

from mnist_cnn.device import Device, follow_quota
from mnist_cnn.digits import CLASSES, SIDE
from mnist_cnn.training import TrainingConfig
from tasks.datasets.snapshots import read_split
from tasks.records import Candidate, ValidatedSnapshot
from tasks.registry.versions import registry_errors
from tasks.services.s3 import Store
from tasks.services.step import step

if TYPE_CHECKING:
    from mlflow.entities import Run

    from mnist_cnn.model import DigitCNN
    from mnist_cnn.training import EpochMetrics, Progress, Training

FLOW_RUN_TAG = "prefect.flow_run_id"
SUPERSEDED = "superseded"
"""Tag of an MLflow run that its flow run has replaced by another; its value is the reason."""

_KEPT_CHECKPOINTS = 3
_SECONDS_BETWEEN_LOG_LINES = 10.0


@step
@registry_errors("the MLflow run of this training")
def train_model(
    validated: ValidatedSnapshot,
    config: TrainingConfig,
    device: Device = "auto",
    processes: int = 1,
) -> Candidate:
    """Train on the snapshot's training split and store the model without pickle.

    Checkpoints go to S3. A repeat within the same flow run, after a crash or a stop, resumes from
    the newest of them, in the same MLflow run. SIGTERM stops training after a last checkpoint. If
    the data or the parameters have changed by then, as after an upgrade, another MLflow run
    supersedes the first.
    """
    import mlflow

    from mnist_cnn.training import TrainingStopped

    logger = get_run_logger()
    follow_quota()  # bounds torch's threads by the container's CPU quota
    snapshot = validated.snapshot
    digits = read_split(snapshot, "train")
    mlflow.set_experiment(snapshot.model_name)
    params = {k: str(v) for k, v in (config.model_dump() | config.recipe().model_dump()).items()}
    earlier = _earlier_run(snapshot.model_name)
    # MLflow refuses to overwrite a parameter, and one run must not mix two data sets.
    if earlier and (changed := _changes(earlier, params, snapshot.digest)):
        _supersede(earlier, changed)
        earlier = None
    # The crash came after training: its result is complete.
    if earlier and (done := _logged_model(earlier)):
        return Candidate(
            name=snapshot.model_name,
            run_id=earlier.info.run_id,
            model=done,
            snapshot=snapshot.digest,
        )
    known_steps = _logged_steps(earlier)
    artifact = _ProgressArtifact()
    with mlflow.start_run(
        earlier.info.run_id if earlier else None,
        run_name=runtime.flow_run.name,
        log_system_metrics=True,
    ) as run:
        mlflow.set_tags(
            {
                FLOW_RUN_TAG: runtime.flow_run.id,
                "snapshot": snapshot.digest,
                "validation": validated.report,
            }
        )
        mlflow.log_params(params)

        def on_epoch(metrics: "EpochMetrics") -> None:
            logger.info("epoch %d: loss %.4f", metrics.epoch, metrics.loss)
            # A resume repeats the steps after its checkpoint. MLflow would keep both values.
            if metrics.step not in known_steps:
                mlflow.log_metrics(_figures(metrics), step=metrics.step, synchronous=False)

        with _sigterm() as stop, _metered() as meter:
            try:
                training = _trainer(processes)(
                    digits,
                    config,
                    device,
                    on_progress=artifact.progress,
                    on_epoch=on_epoch,
                    checkpoints=_Checkpoints(Store(snapshot.store)),
                    stop=stop,
                )
            except TrainingStopped as stopped:
                logger.warning(str(stopped))
                raise
        for warning in training.warnings:
            logger.warning(warning)
        mlflow.log_metrics(
            {
                "training_seconds": training.seconds,
                "warmup_seconds": training.warmup_seconds,
                "steps": training.steps,
                **meter.figures(),
            }
        )
        if meter.kwh is None:
            logger.warning("codecarbon measured no energy; the card will say so")
        if training.resumed_from is not None:
            mlflow.log_metric("resumed_from_step", training.resumed_from)
        mlflow.set_tags(
            {
                "device": training.device,
                "precision": training.precision,
                "outcome": training.outcome,
                "torch": installed("torch"),
                "architecture": str(training.model),
                "machine": json.dumps(meter.machine),
            }
        )
        _log_onnx(training.model)
        model = _log_model(training.model)
        # The epochs were logged asynchronously. Wait for them: a run that has ended is complete.
        mlflow.flush_async_logging()
    artifact.done(
        f"{training.outcome}: {training.steps:,} steps in {training.seconds:.1f} s "
        f"on {training.device}"
    )
    return Candidate(
        name=snapshot.model_name, run_id=run.info.run_id, model=model, snapshot=snapshot.digest
    )


def _trainer(processes: int) -> "Callable[..., Training]":
    """Return `train`, or `train_distributed` with that number of processes."""
    from mnist_cnn.training import train, train_distributed

    return train if processes == 1 else partial(train_distributed, processes=processes)


class _Checkpoints:
    """A `CheckpointStore` in S3 that keeps the newest few checkpoints of this flow run."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._prefix = f"runs/{runtime.flow_run.id}/checkpoints/"

    def save(self, name: str, content: bytes) -> None:
        # The new one first: a crash in between leaves one too many, never none.
        self._store.put(self._prefix + name, content)
        for old in self.list()[:-_KEPT_CHECKPOINTS]:
            self._store.remove(self._prefix + old)

    def list(self) -> list[str]:
        return [name.removeprefix(self._prefix) for name in self._store.names(self._prefix)]

    def load(self, name: str) -> bytes:
        return self._store.get(self._prefix + name)


class _ProgressArtifact:
    """A progress artifact in the Prefect UI, updated while training runs.

    A request to the server takes longer than a training step, so another thread sends it. An update
    that comes while one is being sent is skipped.
    """

    def __init__(self) -> None:
        self._logger = get_run_logger()
        self._artifact: UUID | None = None
        self._sender = ThreadPoolExecutor(1, "progress")
        self._sending = self._send(0.0, "Training has begun.")
        self._logged = time.monotonic()

    def progress(self, now: "Progress") -> None:
        """Show the state of training; called about once a second, and returns at once."""
        sentence = (
            f"step {now.step:,} of {now.steps:,}: {now.images_per_second:,.0f} images/s, "
            f"{now.seconds_left:.0f} s left"
        )
        if time.monotonic() - self._logged > _SECONDS_BETWEEN_LOG_LINES:
            self._logged = time.monotonic()
            self._logger.info(sentence)
        if self._sending.done():
            percent = 100 * now.step / now.steps
            self._sending = self._send(percent, sentence)

    def done(self, sentence: str) -> None:
        """Show the end; log a warning if an update failed on the way."""
        self._logger.info(sentence)
        last = self._send(100.0, sentence)
        self._sender.shutdown(wait=True)
        for sent in (self._sending, last):
            if error := sent.exception():
                self._logger.warning("the progress artifact was not brought up to date: %s", error)

    def _send(self, percent: float, sentence: str) -> Future[object]:
        # Prefect keeps run and settings in context variables, which a new thread starts without.
        run = copy_context().run
        return self._sender.submit(run, self._show, percent, sentence)

    def _show(self, percent: float, sentence: str) -> None:
        if self._artifact:
            update_progress_artifact(self._artifact, percent, sentence)
            return
        artifact = create_progress_artifact(percent, key="training", description=sentence)
        assert isinstance(artifact, UUID)
        self._artifact = artifact


@contextmanager
def _sigterm() -> Iterator[Callable[[], str | None]]:
    """Stop training on SIGTERM; once it has stopped, raise the signal again for Prefect.

    Yields a function to call before each step, which returns the reason to stop, or None. Only a
    main thread can catch signals; elsewhere SIGTERM ends the process at once, and the run resumes
    from the last regular checkpoint.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    # The handler only takes a note: a signal may arrive in the middle of a step.
    caught: list[str] = []
    before = signal.signal(signal.SIGTERM, lambda *_: caught.append("SIGTERM"))
    try:
        yield lambda: caught[0] if caught else None
    finally:
        signal.signal(signal.SIGTERM, before)
        if caught:
            signal.raise_signal(signal.SIGTERM)


@dataclass
class _Meter:
    """Energy and emissions of a training, by codecarbon's estimate, and the machine it ran on."""

    kwh: float | None = None
    """None if codecarbon measured nothing, which the card states as a gap."""
    grams_co2e: float | None = None
    machine: dict[str, str | int | float] = field(default_factory=dict)

    def figures(self) -> dict[str, float]:
        figures = {"energy_kwh": self.kwh, "emissions_g_co2e": self.grams_co2e}
        return {name: value for name, value in figures.items() if value is not None}


@contextmanager
def _metered() -> Iterator[_Meter]:
    """Estimate energy and emissions; the country is `CODECARBON_COUNTRY_ISO_CODE`, else the USA."""
    import psutil
    from codecarbon import OfflineEmissionsTracker

    country = os.environ.get("CODECARBON_COUNTRY_ISO_CODE")
    tracker = OfflineEmissionsTracker(
        country_iso_code=country or "USA",
        save_to_file=False,
        log_level="error",
        allow_multiple_runs=True,
    )
    meter = _Meter()
    tracker.start()
    try:
        yield meter
    finally:
        tracker.stop()
        meter.machine = {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count() or 0,
            "memory_gib": psutil.virtual_memory().total / 2**30,
            "python": platform.python_version(),
        }
        # codecarbon raises none of its errors; after one, only its result is missing.
        used = getattr(tracker, "final_emissions_data", None)
        if used is not None:
            counted = Path("/sys/class/powercap/intel-rapl").exists() or used.gpu_count
            meter.kwh = used.energy_consumed
            meter.grams_co2e = 1000 * used.emissions  # codecarbon gives kilograms
            meter.machine |= {
                "processor": used.cpu_model,
                "accelerator": used.gpu_model or "",
                "codecarbon": used.codecarbon_version,
                "cloud_provider": used.cloud_provider,
                "region": used.country_name if country else f"{used.country_name} (assumed)",
                "method": "from the machine's own power counters"
                if counted
                else "from the processor's model and load; no power counter was readable",
            }


def _figures(metrics: "EpochMetrics") -> dict[str, float]:
    """Return the metrics of an epoch by their names in MLflow, without those not measured."""
    figures = {
        "train_loss": metrics.loss,
        "train_accuracy": metrics.accuracy,
        "images_per_second": metrics.images_per_second,
        "validation_loss": metrics.validation_loss,
        "validation_accuracy": metrics.validation_accuracy,
    }
    return {name: value for name, value in figures.items() if value is not None}


def _earlier_run(experiment: str) -> "Run | None":
    """Return the newest MLflow run of this flow run that none supersedes; None if it has none."""
    import mlflow

    runs: list[Run] = mlflow.search_runs(
        experiment_names=[experiment],
        filter_string=f"tags.`{FLOW_RUN_TAG}` = '{runtime.flow_run.id}'",
        output_format="list",
    )
    return next((run for run in runs if SUPERSEDED not in run.data.tags), None)


def _changes(earlier: "Run", params: Mapping[str, str], snapshot: str) -> list[str]:
    """Return the names of differences from an earlier attempt: the data, or parameters.

    MLflow refuses to change a parameter of a run. For a model that is finished, only the data
    counts.
    """
    known = earlier.data.params
    others = sorted(name for name in {*params, *known} if params.get(name) != known.get(name))
    if not known or _logged_model(earlier):  # without parameters it died before it logged any
        others = []
    same_data = earlier.data.tags.get("snapshot", snapshot) == snapshot
    return others if same_data else ["snapshot", *others]


def _supersede(run: "Run", changed: list[str]) -> None:
    """End an MLflow run that cannot be resumed; log the reason and tag the run with it."""
    from mlflow import MlflowClient

    why = (
        f"another MLflow run of the flow run {runtime.flow_run.id} takes its place: when that was "
        f"resumed, it had another {', '.join(changed)} than before"
    )
    get_run_logger().warning("the MLflow run %s ends: %s", run.info.run_id, why)
    if run.info.status != "FINISHED":
        MlflowClient().set_terminated(run.info.run_id, "KILLED")
    MlflowClient().set_tag(run.info.run_id, SUPERSEDED, why)


def _logged_steps(run: "Run | None") -> set[int]:
    """Return the steps whose metrics an earlier attempt has logged to MLflow."""
    from mlflow import MlflowClient

    if run is None:
        return set()
    history = MlflowClient().get_metric_history(run.info.run_id, "train_loss")
    return {metric.step for metric in history}


def _logged_model(run: "Run") -> str | None:
    """Return the address of the model that an earlier attempt has logged, if it was finished."""
    if run.info.status != "FINISHED" or not (run.outputs and run.outputs.model_outputs):
        return None
    return f"models:/{run.outputs.model_outputs[0].model_id}"


def _log_onnx(model: "DigitCNN") -> None:
    """Log the model as ONNX too, the fastest format for predicting single images."""
    import mlflow

    from mnist_cnn.training.onnx_graph import to_onnx

    with TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        file.write_bytes(to_onnx(model))
        mlflow.log_artifact(str(file), "onnx")


def _log_model(model: "DigitCNN") -> str:
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
