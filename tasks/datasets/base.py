"""The base of a data set: fetched once, by its entry in the catalog or from the store."""

from mnist_cnn.digits import Digits
from mnist_cnn.idx import digits_from_idx
from tasks import keys
from tasks.datasets.catalog import KNOWN, entry_of
from tasks.datasets.snapshots import write_snapshot
from tasks.records import Snapshot
from tasks.services.s3 import Store

BASE_ARCHIVES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
"""Archives of a data set of one's own, under `datasets/NAME/base/`."""


class DatasetUnknown(ValueError):
    """The data set is neither known by name nor has its archives in the store."""


def fetch_base(name: str, store: Store) -> Snapshot:
    """Fetch the base of a data set and write it as a snapshot.

    Raises MirrorUnreachable, DatasetUnknown, and ValueError for archives that are corrupt or hold
    something else.
    """
    entry = entry_of(name)
    train, test = entry.fetch() if entry.fetch else _read_archives(name, store)
    return write_snapshot(store, name, train, test, entry.origin)


def missing_archives(name: str, store: Store) -> list[str]:
    """Return the archives that a data set of one's own lacks in the store."""
    present = store.names(keys.archives(name))
    return [each for each in BASE_ARCHIVES if keys.archives(name, each) not in present]


def _read_archives(name: str, store: Store) -> tuple[Digits, Digits]:
    """Read training and test split of a data set of one's own from its archives in the store."""
    if missing := missing_archives(name, store):
        raise DatasetUnknown(
            f"data set {name!r} is neither {' nor '.join(KNOWN)}, and "
            f"{store.address_of(keys.archives(name))} lacks {', '.join(missing)}: correct the "
            "name, or put the IDX archives there that the data set begins with"
        )
    archives = [store.get(keys.archives(name, each)) for each in BASE_ARCHIVES]
    train = digits_from_idx(archives[0], archives[1], "train")
    return train, digits_from_idx(archives[2], archives[3], "t10k")
