"""Progress of a training: an artifact in the Prefect UI and lines in the log."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import TYPE_CHECKING
from uuid import UUID

from prefect import get_run_logger
from prefect.artifacts import create_progress_artifact, update_progress_artifact

if TYPE_CHECKING:
    from mnist_cnn.training import Progress

_SECONDS_BETWEEN_LOG_LINES = 10.0


class ProgressArtifact:
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
