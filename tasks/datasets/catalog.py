"""The catalog of data sets: origin, licence, writers and promotion policy of each."""

from collections.abc import Callable

from pydantic import BaseModel

from mnist_cnn.digits import Digits
from mnist_cnn.promotion import PromotionPolicy
from mnist_cnn.promotion.policy import FACTOR_FLOORS
from mnist_cnn.sample import embedded_sample
from tasks import keys
from tasks.datasets.mirror import fetch_mnist

AUTO = "auto"
"""A name for `mnist` where it can be downloaded, and for `digits` elsewhere."""


class CatalogEntry(BaseModel, frozen=True):
    """What is known of a data set before it is read. The defaults are those of one's own."""

    origin: str
    """Source of the base's images, recorded with each of its shards."""
    fetch: Callable[[], tuple[Digits, Digits]] | None = None
    """Download its training and test split; None: its archives lie in the store."""
    licence: str = "other"
    hub_id: str
    """Name on the Hugging Face Hub, or in the archive where the Hub has none."""
    writers: str = "Who wrote the digits is known to those who brought the data set."
    """A sentence on the writers of the base."""
    policy: PromotionPolicy | None = None
    """Promotion policy of its models; without one nothing is promoted."""


KNOWN = {
    "mnist": CatalogEntry(
        origin="MNIST archives of LeCun, Cortes and Burges",
        fetch=fetch_mnist,
        licence="cc-by-sa-3.0",
        hub_id="ylecun/mnist",
        writers="MNIST's writers were employees of the US Census Bureau and US high school "
        "students (LeCun, Cortes and Burges 1998, http://yann.lecun.com/exdb/mnist/): a crossed 7 "
        "or a 1 with a long upstroke, as people elsewhere write them, is rare.",
        policy=PromotionPolicy(),
    ),
    "digits": CatalogEntry(
        origin="scikit-learn load_digits, scaled to 28 x 28",
        fetch=embedded_sample,
        licence="cc-by-4.0",
        hub_id="uci/optical-recognition-of-handwritten-digits",
        writers="The sample's digits are by 13 people (Alpaydin and Kaynak 1998, "
        "https://doi.org/10.24432/C50P49), of whom each may be in both splits.",
        # The sample serves to try the pipeline out; its images were scaled up from 8 x 8. The
        # README of mnist_cnn/promotion has the measurements behind these floors.
        policy=PromotionPolicy(
            accuracy_floor=0.96,
            worst_class_floor=0.85,
            shifted_prior_floor=0.94,
            factor_floors=dict.fromkeys(FACTOR_FLOORS, 0.7),
        ),
    ),
}
"""The data sets that need no archives in the store."""


def entry_of(dataset: str) -> CatalogEntry:
    """Return the entry of a data set; one that is not in the catalog has the defaults."""
    own = CatalogEntry(origin=f"archives under {keys.archives(dataset)}", hub_id=dataset)
    return KNOWN.get(dataset, own)
