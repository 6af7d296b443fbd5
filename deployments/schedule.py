"""Give a data set its week: a schedule of its own for train/weekly, in its own time zone.

On the server that `PREFECT_API_URL` names, else on the local stack. Without a data set all
schedules are listed, with the time at which each is due next.
"""

import argparse
import asyncio
import sys
from collections.abc import Iterator
from datetime import UTC, date, datetime, time, timedelta
from functools import partial
from typing import Any
from zoneinfo import ZoneInfo, available_timezones

import yaml
from prefect.client.orchestration import SyncPrefectClient
from prefect.exceptions import PrefectHTTPStatusError
from prefect.server.schemas.schedules import CronSchedule
from pydantic import TypeAdapter, ValidationError

from deployments.due import dataset_of, table, wait_for_runs
from deployments.services import PROJECT, StackError
from deployments.watch import connect_to_prefect, errors_as_sentences
from tasks.datasets.base import BASE_ARCHIVES
from tasks.datasets.ledger import read_base
from tasks.services.s3 import Store, default_store
from tasks.snapshot import Dataset

TRAINING = "train/weekly"
_YEARS_AHEAD = timedelta(days=2 * 366)
_FETCHED = ("mnist", "digits", "auto")  # they need no base: the first run fetches them


def main() -> int:
    """Return 0 only if the schedule is there, or gone, as it was asked for."""
    parser = argparse.ArgumentParser(prog="python -m deployments.schedule", description=__doc__)
    parser.add_argument("--dataset", help="whose week it is; all schedules are listed without it")
    parser.add_argument("--cron", help="minute hour day month weekday, as in '0 3 * * 1'")
    parser.add_argument("--zone", help="a time zone, as in Europe/Berlin")
    parser.add_argument("--remove", action="store_true", help="remove the data set's schedule")
    words = parser.parse_args()
    return errors_as_sentences(lambda: _schedule(words))


def _schedule(words: argparse.Namespace) -> int:
    if not words.dataset and (words.cron or words.zone or words.remove):
        raise StackError("no data set was named; expected DATASET=name with CRON, ZONE and REMOVE")
    with connect_to_prefect() as prefect:
        if words.dataset and words.remove:
            remove_schedule(prefect, words.dataset)
        elif words.dataset:
            rule = read_rule(words.cron, words.zone)
            check_dataset(words.dataset)
            set_schedule(prefect, words.dataset, rule)
            for warning in clock_change_warnings(rule):
                print(warning)
        print(table(wait_for_runs(partial(_request, prefect))))
    return 0


def read_rule(cron: str | None, zone: str | None) -> CronSchedule:
    """Return the rule of a cron expression and a time zone; raise StackError if one is wrong.

    What is not given is as in the weekly schedule of deployments/prefect.yaml.
    """
    default = _default_rule()
    cron, zone = cron or default["cron"], zone or default["timezone"]
    if zone not in available_timezones():
        raise StackError(f"there is no time zone {zone!r}; expected one as in Europe/Berlin")
    malformed = StackError(
        f"{cron!r} is no cron expression; expected exactly five fields, minute, hour, day, month "
        "and weekday, as in '0 3 * * 1', which is Mondays at three, or a word such as @weekly"
    )
    # Prefect takes seconds in a sixth field, which others have first: the run would come at
    # another time than it was meant to.
    if len(cron.split()) != (1 if cron.startswith("@") else 5):
        raise malformed
    try:
        rule = CronSchedule(cron=cron, timezone=zone)
    except ValidationError as error:
        raise malformed from error
    if not _ever_comes(rule):
        raise StackError(f"{cron!r} never comes; expected a time that does, as in '0 3 * * 1'")
    return rule


def check_dataset(dataset: str) -> None:
    """Raise StackError unless the data set exists: it is fetched, or has its base in the store."""
    try:
        TypeAdapter(Dataset).validate_python(dataset)
    except ValidationError as error:
        raise StackError(
            f"{dataset!r} is no name of a data set; expected small letters, digits and hyphens"
        ) from error
    if dataset in _FETCHED:
        return
    try:
        store, folder = Store(default_store()), f"datasets/{dataset}/base/"
        missing = [name for name in BASE_ARCHIVES if not store.has(folder + name)]
        if missing and read_base(store, dataset) is None:
            raise StackError(
                f"there is no data set {dataset}: {store.address_of(folder)} lacks "
                f"{', '.join(missing)}; upload its four archives first"
            )
    except OSError as error:  # StorageUnreachable and StorageRefused
        raise StackError(str(error)) from error


def set_schedule(prefect: SyncPrefectClient, dataset: str, rule: CronSchedule) -> None:
    """Add a schedule of the data set to train/weekly, or change the one that trains it already.

    That may be one of deployments/prefect.yaml: two would be two weeks. `make up` keeps the change.
    """
    training = _training(prefect)
    found = _found(training, dataset)
    if dataset in _taken():
        raise StackError(
            f"`{dataset}` is the name of a schedule in deployments/prefect.yaml; give the data set "
            "another name, or change that schedule there"
        )
    path = f"/deployments/{training['id']}/schedules"
    given = found["parameters"] if found else {}
    content = {
        "slug": found["slug"] if found else dataset,
        "schedule": rule.model_dump(mode="json"),
        "active": True,
        "parameters": {**given, "dataset": dataset},
    }
    if found:
        _request(prefect, "PATCH", f"{path}/{found['id']}", content)
    else:
        _request(prefect, "POST", path, [content])
    # The server makes the runs of a deployment that was just changed at once.
    _request(prefect, "PATCH", f"/deployments/{training['id']}", {"paused": training["paused"]})


def remove_schedule(prefect: SyncPrefectClient, dataset: str) -> None:
    """Remove the schedule that trains the data set from train/weekly; StackError if none does."""
    training = _training(prefect)
    found = None if dataset in _taken() else _found(training, dataset)
    if found is None:
        raise StackError(f"{TRAINING} has no schedule of the data set {dataset}; `make schedule`")
    _request(prefect, "DELETE", f"/deployments/{training['id']}/schedules/{found['id']}", None)


def clock_change_warnings(rule: CronSchedule) -> list[str]:
    """Return a sentence for each coming change of the clocks that costs or doubles a run."""
    wall = CronSchedule(cron=rule.cron, timezone="UTC")  # as if the clocks never changed
    warnings = []
    for day in _clock_changes(rule.timezone or "UTC"):
        usual, real = _count(wall, day), _count(rule, day)
        if real != usual:
            warnings.append(
                f"{day:%A %d %B %Y}: the clocks of {rule.timezone} change, and {real} instead of "
                f"{usual} runs are made; choose an hour at which they do not change"
            )
    return warnings


def _clock_changes(zone: str) -> Iterator[date]:
    """Yield the days of the coming two years that are not 24 hours long."""
    first = datetime.now(ZoneInfo(zone)).date()
    for number in range(_YEARS_AHEAD.days):
        day = first + timedelta(days=number)
        begin, end = _bounds(day, zone)
        if begin.utcoffset() != end.utcoffset():
            yield day


def _bounds(day: date, zone: str | None) -> tuple[datetime, datetime]:
    """Return the midnights before and after a day."""
    midnight = datetime.combine(day, time(), ZoneInfo(zone or "UTC"))
    return midnight, midnight + timedelta(days=1)  # by the clock, however long the day is


def _count(rule: CronSchedule, day: date) -> int:
    """Return how many runs a rule makes on a day of its time zone."""
    begin, end = _bounds(day, rule.timezone)
    return sum(each < end for each in _dates(rule, begin, end, 24 * 60))


def _dates(rule: CronSchedule, start: datetime, end: datetime, number: int) -> list[datetime]:
    return list(asyncio.run(rule.get_dates(n=number, start=start, end=end)))


def _ever_comes(rule: CronSchedule) -> bool:
    now = datetime.now(UTC)
    try:
        return bool(_dates(rule, now, now + 4 * _YEARS_AHEAD, 1))
    except ValueError:  # the 31st of February
        return False


def _default_rule() -> dict[str, str]:
    return next(entry for entry in _file_schedules() if entry["slug"] == "weekly")


def _taken() -> set[str]:
    return {entry["slug"] for entry in _file_schedules()}


def _file_schedules() -> list[dict[str, str]]:
    file = yaml.safe_load((PROJECT / "deployments" / "prefect.yaml").read_text())
    (training,) = (
        each for each in file["deployments"] if each["entrypoint"] == "flows.train.train"
    )
    return list(training["schedules"])


def _training(prefect: SyncPrefectClient) -> dict[str, Any]:
    try:
        found = _request(prefect, "GET", f"/deployments/name/{TRAINING}", None)
    except PrefectHTTPStatusError as error:
        raise StackError(
            f"{prefect.api_url} has no deployment {TRAINING} ({error.response.status_code}); "
            "deploy deployments/prefect.yaml there, or `make up` for the local stack"
        ) from error
    return dict(found)


def _found(training: dict[str, Any], dataset: str) -> dict[str, Any] | None:
    """Return the schedule that is called like the data set, else the one that trains it."""
    own = [each for each in training["schedules"] if each["slug"] == dataset]
    its = [each for each in training["schedules"] if dataset_of(training, each) == dataset]
    return next(iter(own + its), None)


def _request(prefect: SyncPrefectClient, method: Any, path: Any, content: object) -> Any:
    answer = prefect.request(method, path, json=content)
    return answer.json() if answer.content else None


if __name__ == "__main__":
    sys.exit(main())
