"""Train a candidate, and log it with its metrics and its origin to an MLflow run."""

import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version as installed
from typing import TYPE_CHECKING

from prefect import get_run_logger, runtime

from mnist_cnn.device import Device, follow_quota
from mnist_cnn.training import TrainingConfig
from tasks import keys
from tasks.datasets.snapshots import read_split
from tasks.records import Candidate, ValidatedSnapshot
from tasks.registry.training_run import find_earlier_run, logged_model, training_run
from tasks.services.energy import metered
from tasks.services.mlflow import registry_errors
from tasks.services.progress import ProgressArtifact
from tasks.services.s3 import Store
from tasks.services.step import step

if TYPE_CHECKING:
    from mnist_cnn.training import EpochMetrics, Training

_KEPT_CHECKPOINTS = 3


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
    from mnist_cnn.training import TrainingStopped

    logger = get_run_logger()
    follow_quota()  # bounds torch's threads by the container's CPU quota
    snapshot = validated.snapshot
    digits = read_split(snapshot, "train")
    name = snapshot.model_name
    params = {k: str(v) for k, v in (config.model_dump() | config.recipe().model_dump()).items()}
    earlier = find_earlier_run(name, params, snapshot.digest)
    # The crash came after training: its result is complete.
    if earlier and (done := logged_model(earlier)):
        return Candidate(
            name=name, run_id=earlier.info.run_id, model=done, snapshot=snapshot.digest
        )
    artifact = ProgressArtifact()
    tags = {"snapshot": snapshot.digest, "validation": validated.report}
    with training_run(name, earlier, tags, params) as run:

        def on_epoch(metrics: "EpochMetrics") -> None:
            logger.info("epoch %d: loss %.4f", metrics.epoch, metrics.loss)
            run.log_epoch(metrics)

        with _sigterm() as stop, metered() as meter:
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
        resumed = training.resumed_from
        run.log_figures(
            {
                "training_seconds": training.seconds,
                "warmup_seconds": training.warmup_seconds,
                "steps": training.steps,
                **({} if resumed is None else {"resumed_from_step": resumed}),
                **meter.figures(),
            }
        )
        if meter.kwh is None:
            logger.warning("codecarbon measured no energy; the card will say so")
        run.log_tags(
            {
                "device": training.device,
                "precision": training.precision,
                "outcome": training.outcome,
                "torch": installed("torch"),
                "architecture": str(training.model),
                "machine": json.dumps(meter.machine),
            }
        )
        model = run.log_model(training.model)
    artifact.done(
        f"{training.outcome}: {training.steps:,} steps in {training.seconds:.1f} s "
        f"on {training.device}"
    )
    return Candidate(name=name, run_id=run.id, model=model, snapshot=snapshot.digest)


def _trainer(processes: int) -> "Callable[..., Training]":
    """Return `train`, or `train_distributed` with that number of processes."""
    from mnist_cnn.training import train, train_distributed

    return train if processes == 1 else partial(train_distributed, processes=processes)


class _Checkpoints:
    """A `CheckpointStore` in S3 that keeps the newest few checkpoints of this flow run."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._prefix = keys.checkpoints(runtime.flow_run.id)

    def save(self, name: str, content: bytes) -> None:
        # The new one first: a crash in between leaves one too many, never none.
        self._store.put(self._prefix + name, content)
        for old in self.list()[:-_KEPT_CHECKPOINTS]:
            self._store.remove(self._prefix + old)

    def list(self) -> list[str]:
        return [name.removeprefix(self._prefix) for name in self._store.names(self._prefix)]

    def load(self, name: str) -> bytes:
        return self._store.get(self._prefix + name)


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
