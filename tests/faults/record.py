"""What was seen of a year: small values, kept as JSON, from which it is judged and drawn."""

from pydantic import BaseModel


class StateSeen(BaseModel, frozen=True):
    """A state of a run, at the time when the server noted it."""

    when: float
    type: str
    name: str


class RunSeen(BaseModel, frozen=True):
    """A flow run of the year's data set, or of the watch."""

    id: str
    flow: str
    due: float
    """When it was due, seconds since the epoch."""
    scheduled: bool
    """The schedule made it."""
    message: str
    states: list[StateSeen]

    @property
    def last(self) -> StateSeen:
        """Its present state."""
        return self.states[-1]


class FaultSeen(BaseModel, frozen=True):
    """A fault that struck."""

    name: str
    when: float
    until: float
    """When it was over; of a blow to a run the same moment."""
    run: str | None = None


class ArrivalSeen(BaseModel, frozen=True):
    """A batch that was dropped."""

    name: str
    content: str
    when: float
    late: bool
    images: list[str]
    """Digest of each image."""


class Whereabouts(BaseModel, frozen=True):
    """Where the images lie at the end, by their digests."""

    accepted: list[str]
    quarantined: list[str]
    waiting: list[str]


class ChampionSeen(BaseModel, frozen=True):
    """Which version had the alias, from this time on; None if none had."""

    when: float
    version: str | None


class MoveSeen(BaseModel, frozen=True):
    """A move of the history."""

    when: float
    action: str
    version: str
    who: str


class MessageSeen(BaseModel, frozen=True):
    """A message that arrived, with the fields of its JSON."""

    when: float
    fields: dict[str, str]


class Sizes(BaseModel, frozen=True):
    """Bytes on disk and in memory at one time."""

    when: float
    store: int
    databases: dict[str, int]
    memory: dict[str, int]


class ActSeen(BaseModel, frozen=True):
    """Something that the person of the year did."""

    when: float
    what: str


class Record(BaseModel, frozen=True):
    """A year as it was."""

    seed: int
    weeks: int
    interval: float
    """Seconds from week to week."""
    begun: float
    ended: float
    runs: list[RunSeen]
    faults: list[FaultSeen]
    arrivals: list[ArrivalSeen]
    whereabouts: Whereabouts
    refused: list[str]
    """Names of the quarantined batches."""
    champions: list[ChampionSeen]
    moves: list[MoveSeen]
    history_problems: list[str]
    messages: list[MessageSeen]
    acts: list[ActSeen]
    sizes: list[Sizes]
    retained: Sizes
    """After retention, at the end."""
    mishaps: list[str]
    """What the year's own machinery could not do."""

    def week(self, when: float) -> float:
        """Return a time in weeks since the beginning."""
        return (when - self.begun) / self.interval
