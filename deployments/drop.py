"""Drop a batch on the stack of `PREFECT_API_URL`, or the local one, and say that it arrived."""

import argparse
import sys
from pathlib import Path

import httpx
from prefect.client.orchestration import SyncPrefectClient
from prefect.events import Event, Resource
from pydantic import TypeAdapter, ValidationError

from deployments.stack import StackError
from deployments.watch import connect_to_prefect, errors_as_sentences
from tasks import keys
from tasks.arrivals.batch_files import MARKER, BadBatch, check_names
from tasks.services.s3 import STORE_VARIABLE, Store, default_store
from tasks.snapshot import Dataset


def main() -> int:
    """Run the command line; return 0 only if the batch is complete and its event was emitted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", required=True, help="its name, which was never used before")
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("files", nargs="+", type=Path, help="an IDX pair, or Parquet files")
    options = parser.parse_args()
    # A batch is one flat folder: of two files with one name the second would replace the first.
    if len({path.name for path in options.files}) < len(options.files):
        parser.error("two of the files have one name; expected names that differ")
    return errors_as_sentences(lambda: _drop(options))


def _drop(options: argparse.Namespace) -> int:
    check_name(options.dataset)
    try:
        files = {path.name: path.read_bytes() for path in options.files}
        with connect_to_prefect() as prefect:
            address = drop(options.dataset, options.batch, files)
            announce(prefect, options.dataset, options.batch)
    except (BadBatch, OSError) as error:
        raise StackError(str(error)) from error
    print(f"{address} holds {len(files)} files. A minute after the last arrival ingest/on-arrival")
    print("judges them: accepted, they begin train/weekly; refused, they lie in quarantine/.")
    return 0


def check_name(dataset: str) -> None:
    """Raise StackError unless the text can be the name of a data set."""
    try:
        TypeAdapter(Dataset).validate_python(dataset)
    except ValidationError as error:
        raise StackError(
            f"{dataset!r} is no name of a data set; expected at most 63 small letters, digits and "
            "hyphens, a hyphen not first, as in mnist"
        ) from error


def open_store() -> Store:
    """Return the store of `RETRAINING_STORE`; raise StackError if that is no address of one."""
    try:
        return Store(default_store())
    except ValueError as error:
        raise StackError(f"{error}; correct {STORE_VARIABLE}") from error


def drop(dataset: str, batch: str, files: dict[str, bytes]) -> str:
    """Upload a batch, the marker last, and return its address.

    `files` maps names to contents. Raises BadBatch if a name or the set of files is not allowed, or
    if the batch exists already.
    """
    check_names({f"{batch}.parquet": 1})  # the rules for a file's name hold for the batch's as well
    check_names({name: len(content) for name, content in files.items()})
    store = open_store()
    folder = keys.incoming(dataset, batch)
    if store.names(folder):
        raise BadBatch(f"{store.address_of(folder)} holds files already: choose another name")
    # The marker comes last: ingest takes a batch for complete as soon as the marker is there.
    for name, content in [*files.items(), (MARKER, b"")]:
        store.put(keys.incoming(dataset, batch, name), content)
    return store.address_of(folder)


def announce(prefect: SyncPrefectClient, dataset: str, batch: str) -> None:
    """Emit `batch.arrived`, which triggers ingest/on-arrival (see deployments/prefect.yaml).

    Raises StackError if the server does not accept the event.
    """
    resource = Resource({"prefect.resource.id": f"dataset.{dataset}"})
    event = Event(event="batch.arrived", resource=resource, payload={"batch": batch})
    # By HTTP, not by `emit_event`: that sends in the background and reports no failure.
    try:
        prefect.request("POST", "/events", json=[event.model_dump(mode="json")])
    except httpx.HTTPError as error:
        raise StackError(
            f"batch {batch} lies there, but the Prefect server did not take the news of it "
            f"({error}); the nightly run of ingest/on-arrival finds it, or start that run now"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
