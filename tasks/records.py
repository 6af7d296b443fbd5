"""What tasks hand each other: small, addressable values that survive a crash; never arrays."""

from datetime import datetime
from typing import Literal

from pydantic import BaseModel

Split = Literal["train", "test"]
SPLITS: tuple[Split, Split] = ("train", "test")


class Shard(BaseModel, frozen=True):
    """A part of a split: the digest of its images and labels, and what it holds."""

    digest: str
    images: int
    labels: list[int]
    """How many images show each digit."""
    origin: str


class Snapshot(BaseModel, frozen=True):
    """An immutable set of training and test images, known by the digest of its manifest."""

    dataset: str
    store: str
    digest: str
    train: list[Shard]
    test: list[Shard]
    parent: str | None = None
    """Digest of the snapshot that this one extends by a batch; None for a base data set."""
    until: datetime | None = None
    """When the newest batch in it had arrived; None for a base data set, which has none."""

    @property
    def address(self) -> str:
        """Where the manifest is."""
        return f"{self.store}/datasets/{self.dataset}/snapshots/{self.digest}.json"

    @property
    def model_name(self) -> str:
        """The registered model trained on this data set: models of different data never compete."""
        return f"{self.dataset}-cnn"

    def shards(self, split: Split) -> list[Shard]:
        """Return the shards of one split, in order."""
        return self.train if split == "train" else self.test

    def labels(self, split: Split) -> list[int]:
        """Count the images of each digit in one split."""
        return [sum(counts) for counts in zip(*(s.labels for s in self.shards(split)), strict=True)]

    def images(self, split: Split) -> int:
        """Count the images of one split."""
        return sum(shard.images for shard in self.shards(split))


class BatchFile(BaseModel, frozen=True):
    """A file as a producer dropped it."""

    name: str
    """Relative to the batch's folder."""
    bytes: int
    etag: str
    """The S3 server's word for its content."""


class Verdict(BaseModel, frozen=True):
    """What became of a batch: an entry of the data set's ledger, which is never changed."""

    sequence: int
    """Its place in the ledger, from 1."""
    dataset: str
    batch: str
    """The name of its folder under `incoming/`."""
    accepted: bool
    reason: str
    """Why it was put aside, one clause for each failure; of an accepted one, what is worth a look.
    """
    digest: str
    """SHA-256 of the names and contents of its files."""
    arrived: datetime
    """When the last of its files was written."""
    files: list[BatchFile]
    images: int | None
    """How many it holds; None if it could not be read."""
    shards: list[Shard] = []
    """What was accepted of it."""
    repeated: int = 0
    """Images of an accepted batch that were left out because they are in the data set already."""
    report: str | None = None
    """Address of the validation report; None if it could not be read."""
    run: str = ""
    """The Prefect flow run that judged it; empty in entries from before this was kept."""


class ValidatedSnapshot(BaseModel, frozen=True):
    """A snapshot that passed validation. Only the validation task makes one."""

    snapshot: Snapshot
    report: str
    """Address of the validation result that passed it."""
    expectations: int
    """How many were asked."""
    warnings: list[str]
    """A sentence for each that failed and is not critical."""


class RejectedSnapshot(BaseModel, frozen=True):
    """A snapshot that failed a critical expectation: nothing is trained on it."""

    snapshot: Snapshot
    report: str
    failures: list[str]
    """One sentence for each: expectation, observed value and bound."""


class Intake(BaseModel, frozen=True):
    """What a flow run took in, fixed for it: a resume works on the same data."""

    format: Literal[1] = 1
    validated: ValidatedSnapshot
    verdicts: list[Verdict]
    told: str
    """What was said of the batches."""


class Candidate(BaseModel, frozen=True):
    """A trained model in MLflow that is not registered yet."""

    name: str
    """Name under which it is registered."""
    run_id: str
    model: str
    """Its address, `models:/m-…`."""
    snapshot: str
    """Digest of the snapshot that it was trained on."""


class ModelVersion(BaseModel, frozen=True):
    """A version in the MLflow registry."""

    name: str
    version: str
    run_id: str
    model: str
    """Its address, `models:/NAME/VERSION`."""
    snapshot: str
    """Digest of the snapshot that it was trained on."""


class RunSummary(BaseModel, frozen=True):
    """What a run did: the same facts for the terminal, the Prefect UI and whoever asks later."""

    flow_run: str
    verdict: str
    """Promoted, Champion kept or Data rejected."""
    reason: str
    dataset: str
    accuracy: float | None = None
    champion_accuracy: float | None = None
    """The champion's accuracy on the same images, before this run's decision."""
    version: str | None = None
    """Address of the registered candidate, `models:/NAME/VERSION`."""
    champion_before: str | None = None
    champion: str | None = None
    """Address of the champion after this run."""
    links: dict[str, str]

    @property
    def message(self) -> str:
        """What the run's state says: the reason, and where to judge if a person has to."""
        form = self.links.get("approval form")
        return f"{self.reason}; approve or reject: {form}" if form else self.reason
