"""Values passed between tasks: small, addressable, and able to survive a crash; never arrays."""

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, Field

from mnist_cnn.record import Format, Record
from tasks import keys

Split = Literal["train", "test"]
SPLITS: tuple[Split, Split] = ("train", "test")


class Shard(BaseModel, frozen=True):
    """A part of a split, named by the digest of its images and labels."""

    digest: str
    images: int
    labels: list[int]
    """Number of images of each digit."""
    origin: str
    """Source of its images: the archives of the base data set, or a batch."""


class Snapshot(Record):
    """An immutable set of training and test images, identified by the digest of its manifest."""

    # A number would be part of the digest, which has to be that of the data in every release.
    format: Format = None
    dataset: str
    store: str
    digest: str
    train: list[Shard]
    test: list[Shard]
    parent: str | None = None
    """Digest of the snapshot that this one extends by a batch; None for a base data set."""
    until: datetime | None = None
    """Time at which its newest batch had arrived; None for a base data set, which has none."""

    @property
    def address(self) -> str:
        """Address of the manifest."""
        return f"{self.store}/{keys.manifest(self.dataset, self.digest)}"

    @property
    def model_name(self) -> str:
        """Name of the registered model. Models of different data sets never compete."""
        return f"{self.dataset}-cnn"

    def shards(self, split: Split) -> list[Shard]:
        """Return the shards of one split, in order."""
        return self.train if split == "train" else self.test

    def labels(self, split: Split) -> list[int]:
        """Return the number of images of each digit in one split."""
        # One row a shard, one column a digit: summed by column.
        return [sum(counts) for counts in zip(*(s.labels for s in self.shards(split)), strict=True)]

    def images(self, split: Split) -> int:
        """Return the number of images in one split."""
        return sum(shard.images for shard in self.shards(split))


class BatchFile(BaseModel, frozen=True):
    """A file of a batch, as its producer uploaded it."""

    name: str
    """Relative to the batch's folder."""
    bytes: int
    etag: str
    """The S3 server's tag of its content, which changes with it."""


class BatchVerdict(Record):
    """Verdict on a batch: an entry of the data set's ledger, which is never changed."""

    sequence: int
    """Position in the ledger, from 1."""
    dataset: str
    batch: str
    """Name of its folder under `incoming/`; empty for files beside the folders."""
    accepted: bool
    reason: str
    """Reason for the quarantine, one clause for each failure.

    For an accepted batch, the number of its new images and its warnings.
    """
    digest: str
    """SHA-256 of the names and contents of its files."""
    arrived: datetime
    """Time at which the last of its files was written."""
    files: list[BatchFile]
    images: int | None
    """Number of images that it holds; None if it could not be read."""
    shards: list[Shard] = Field([])
    """Shards of its accepted images."""
    repeated: int = 0
    """Images of an accepted batch that were left out because they are in the data set already."""
    report: str | None = None
    """Address of the validation report; None if the batch could not be read."""
    run: str = ""
    """Prefect flow run that judged it; empty in entries older than this field."""


class ValidatedSnapshot(Record):
    """A snapshot that passed validation. Only the validation task makes one."""

    snapshot: Snapshot
    report: str
    """Address of the validation report."""
    expectations: int
    """Number of expectations that were checked."""
    warnings: list[str]
    """One sentence for each expectation that failed and is not critical."""


class RejectedSnapshot(Record):
    """A snapshot that failed a critical expectation: nothing is trained on it."""

    snapshot: Snapshot
    report: str
    """Address of the validation report."""
    failures: list[str]
    """One sentence for each failed critical expectation: expectation, observed value and bound."""


class Intake(Record):
    """Data of a flow run, fixed for it: a resumed run trains on the same."""

    validated: ValidatedSnapshot
    verdicts: list[BatchVerdict]
    told: str
    """Summary of the verdicts, as a sentence."""


class Candidate(BaseModel, frozen=True):
    """A trained model in MLflow that is not registered yet."""

    name: str
    """Name under which it is to be registered."""
    run_id: str
    """MLflow run of its training."""
    model: str
    """Its address, `models:/m-…`."""
    snapshot: str
    """Digest of the snapshot that it was trained on."""


class ModelVersion(BaseModel, frozen=True):
    """A version in the MLflow registry."""

    name: str
    version: str
    """Version number, as text."""
    run_id: str
    """MLflow run of its training."""
    model: str
    """Its address, `models:/NAME/VERSION`."""
    snapshot: str
    """Digest of the snapshot that it was trained on."""


class RunSummary(Record):
    """Result of a run: the same facts for the terminal, the Prefect UI and later readers."""

    flow_run: str
    verdict: str
    """Name of the run's state, such as Promoted, Champion kept or Data rejected."""
    reason: str
    dataset: str
    accuracy: float | None = None
    champion_accuracy: float | None = None
    """The champion's accuracy on the same images, before this run's decision."""
    version: str | None = None
    """Address of the registered candidate, `models:/NAME/VERSION`."""
    champion_before: str | None = None
    """Address of the champion before this run."""
    champion: str | None = None
    """Address of the champion after this run."""
    links: dict[str, str]
    """Addresses for a browser, by name."""

    @property
    def message(self) -> str:
        """Message of the run's state: the reason, and the approval form if approval is needed."""
        form = self.links.get("approval form")
        return f"{self.reason}; approve or reject: {form}" if form else self.reason
