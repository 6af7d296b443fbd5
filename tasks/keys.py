"""The key of every object in the store. No other module spells one out.

    datasets/NAME/base/ARCHIVE                        the archives that a data set of one's own has
    datasets/NAME/base.json                           the snapshot that all batches extend
    datasets/NAME/incoming/BATCH/…                    dropped by producers
    datasets/NAME/ledger/000007-SHA256.json           the verdict on a batch, in force
    datasets/NAME/ledger/000007-SHA256.settled        its files have been moved
    datasets/NAME/accepted/000007-BATCH/…             report.html, and under files/ the batch
    datasets/NAME/quarantine/000008-BATCH/…           likewise, with reason.json
    datasets/NAME/shards/SHA256.parquet               images and labels, content-addressed
    datasets/NAME/shards/SHA256.digests.npy           one row an image: its two digests
    datasets/NAME/snapshots/SHA256.json               manifests, written last
    datasets/NAME/snapshots/SHA256.profile.json       the distribution of the training images
    datasets/NAME/validations/SHA256-CODE/…           report.html, results.json, and the verdict
    datasets/NAME/decisions/SPLIT/TIME-FLOW_RUN.json  every decision on a test split
    runs/FLOW_RUN/NAME.json                           records: intake, rollback, summary, outcome
    runs/FLOW_RUN/checkpoints/…                       the newest few of its training
    runs/FLOW_RUN/ROLE-outcomes.npz                   predictions of candidate and champions
    runs/FLOW_RUN/ROLE-evaluation.json                the figures made of them
    runs/FLOW_RUN/pictures/NAME.png                   for the model card
    models/NAME/history/000003-SHA256.json            the champion's moves
    models/NAME/carried-out/000003-SHA256.json        their confirmations
    messages/KEY.json                                 a message, and which blocks have taken it
    watch/last-look.json                              up to when all events were reported
    watch/histories-verified.json                     the last check of each history
    gate-check/FLOW_RUN/…                             a gate check's own store, removed at its end
    check/write-and-read                              written and removed before each run

A folder ends with a slash. A function with a parameter `name` returns the key of the object of that
name in the folder, and without a name the folder.
"""

from urllib.parse import quote

DATASETS = "datasets/"
RUNS = "runs/"
MODELS = "models/"
MESSAGES = "messages/"
GATE_CHECKS = "gate-check/"

HISTORIES_VERIFIED = "watch/histories-verified.json"
LAST_LOOK = "watch/last-look.json"
CHECK = "check/write-and-read"


def archives(dataset: str, name: str = "") -> str:
    """Return the folder of the archives that a data set of one's own begins with."""
    return f"{DATASETS}{dataset}/base/{name}"


def base(dataset: str) -> str:
    """Return the key of the object that names the base snapshot."""
    return f"{DATASETS}{dataset}/base.json"


def incoming(dataset: str, batch: str = "", name: str = "") -> str:
    """Return the folder into which producers drop a batch, or by default all batches."""
    return f"{DATASETS}{dataset}/incoming/{batch}{'/' if batch else ''}{name}"


def ledger(dataset: str) -> str:
    """Return the folder of the verdicts on all batches."""
    return f"{DATASETS}{dataset}/ledger/"


def verdict(dataset: str, sequence: int, digest: str) -> str:
    """Return the key of the verdict on a batch whose files have that digest."""
    return f"{ledger(dataset)}{sequence:06d}-{digest}.json"


def settled(dataset: str, sequence: int, digest: str) -> str:
    """Return the key of the marker of a batch whose files have been moved."""
    return f"{ledger(dataset)}{sequence:06d}-{digest}.settled"


def judged(dataset: str, sequence: int, batch: str, name: str = "", *, accepted: bool) -> str:
    """Return the folder of a judged batch: its files, its report and its reason."""
    where = "accepted" if accepted else "quarantine"
    return f"{DATASETS}{dataset}/{where}/{sequence:06d}-{_plain(batch)}/{name}"


def kept_file(name: str) -> str:
    """Return the name of a producer's file in the folder of its judged batch.

    The files lie in a folder of their own, since a producer may call one `reason.json`.
    """
    return f"files/{_plain(name)}"


def shard(dataset: str, digest: str) -> str:
    """Return the key of a shard."""
    return f"{DATASETS}{dataset}/shards/{digest}.parquet"


def shard_digests(dataset: str, digest: str) -> str:
    """Return the key of the digests of a shard's images."""
    return f"{DATASETS}{dataset}/shards/{digest}.digests.npy"


def manifest(dataset: str, digest: str) -> str:
    """Return the key of a snapshot's manifest."""
    return f"{DATASETS}{dataset}/snapshots/{digest}.json"


def profile(dataset: str, digest: str) -> str:
    """Return the key of a snapshot's reference profile."""
    return f"{DATASETS}{dataset}/snapshots/{digest}.profile.json"


def validation(dataset: str, snapshot: str, code: str, name: str) -> str:
    """Return the key of a part of the verdict on a snapshot by expectations with that digest."""
    return f"{DATASETS}{dataset}/validations/{snapshot}-{code}/{name}"


def decisions(dataset: str, test_split: str, name: str = "") -> str:
    """Return the folder of all decisions on a test split."""
    return f"{DATASETS}{dataset}/decisions/{test_split}/{name}"


def record(run: object, name: str) -> str:
    """Return the key of a record of a flow run."""
    return f"{RUNS}{run}/{name}.json"


def checkpoints(run: object, name: str = "") -> str:
    """Return the folder of a flow run's checkpoints."""
    return f"{RUNS}{run}/checkpoints/{name}"


def outcomes(run: object, role: str) -> str:
    """Return the key of the predictions of a model that a flow run evaluated."""
    return f"{RUNS}{run}/{role}-outcomes.npz"


def evaluation(run: object, role: str) -> str:
    """Return the key of the evaluation of a model by a flow run."""
    return record(run, f"{role}-evaluation")


def picture(run: object, name: str) -> str:
    """Return the key of a picture that a flow run drew."""
    return f"{RUNS}{run}/pictures/{name}.png"


def history(model: str) -> str:
    """Return the folder of a registered model's moves."""
    return f"{MODELS}{model}/history/"


def move(model: str, sequence: int, digest: str) -> str:
    """Return the key of a move."""
    return f"{history(model)}{sequence:06d}-{digest}.json"


def carried_out(model: str) -> str:
    """Return the folder of the confirmations of a registered model's moves."""
    return f"{MODELS}{model}/carried-out/"


def confirmation(model: str, sequence: int, digest: str) -> str:
    """Return the key of the confirmation that a move was carried out."""
    return f"{carried_out(model)}{sequence:06d}-{digest}.json"


def message(key: str) -> str:
    """Return the key of the record of a message to people."""
    return f"{MESSAGES}{key}.json"


def gate_check(run: object) -> str:
    """Return the folder that a gate check uses as a store of its own."""
    return f"{GATE_CHECKS}{run}/"


def _plain(name: str) -> str:
    """Return a name without characters and dots that have a meaning in a file system."""
    parts = [quote(part, safe="") for part in name.split("/")]
    return "/".join(part.replace(".", "%2E") if not part.strip(".") else part for part in parts)
