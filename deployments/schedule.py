"""Give a data set its week: a schedule of its own for train/weekly, in its own time zone.

On the server that `PREFECT_API_URL` names, else on the local stack. Without a data set all
schedules are listed, with the time at which each is due next.
"""

import argparse
import asyncio
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, date, datetime, time, timedelta
from functools import partial
from typing import Any
from zoneinfo import ZoneInfo, available_timezones

import yaml
from prefect.client.orchestration import SyncPrefectClient
from prefect.exceptions import PrefectHTTPStatusError
from prefect.server.schemas.schedules import CronSchedule
from pydantic import ValidationError

from deployments.drop import check_name, open_store
from deployments.due import dataset_of, table, wait_for_runs
from deployments.services import PROJECT, StackError
from deployments.watch import connect_to_prefect, errors_as_sentences
from tasks import keys
from tasks.datasets.base import missing_archives
from tasks.datasets.catalog import AUTO, KNOWN
from tasks.datasets.ledger import read_base

TRAINING = "train/weekly"
_YEARS_AHEAD = timedelta(days=2 * 366)
_NOWHERE = {"localtime", "Factory"}
"""Time zones that are another thing on each machine, or none."""
_PIECE = timedelta(hours=12)
"""Time whose runs Prefect lists completely: it looks at 1,000 dates, one a minute at most."""


def main() -> int:
    """Run the command line; return 0 only if the requested change or list was made."""
    parser = argparse.ArgumentParser(prog="python -m deployments.schedule", description=__doc__)
    parser.add_argument("--dataset", help="whose week it is; all schedules are listed without it")
    parser.add_argument("--cron", help="minute hour day month weekday, as in '0 3 * * 1'")
    parser.add_argument("--zone", help="a time zone, as in Europe/Berlin")
    parser.add_argument("--remove", action="store_true", help="remove the data set's schedule")
    options = parser.parse_args()
    return errors_as_sentences(lambda: _schedule(options))


def _schedule(options: argparse.Namespace) -> int:
    if not options.dataset and (options.cron or options.zone or options.remove):
        raise StackError("no data set was named; expected DATASET=name with CRON, ZONE and REMOVE")
    with connect_to_prefect() as prefect:
        if options.dataset and options.remove:
            remove_schedule(prefect, options.dataset)
        elif options.dataset:
            # Checked before anything is changed on the server.
            check_dataset(options.dataset)
            present = present_rule(prefect, options.dataset)
            rule = read_rule(options.cron, options.zone, present)
            set_schedule(prefect, options.dataset, rule)
            for warning in clock_change_warnings(rule):
                print(warning)
        print(table(wait_for_runs(partial(_request, prefect))))
    return 0


def read_rule(
    cron: str | None, zone: str | None, present: Mapping[str, Any] | None = None
) -> CronSchedule:
    """Return the rule of a cron expression and a time zone.

    A missing expression or zone is taken from the `present` rule of the data set; without one, from
    the weekly schedule of deployments/prefect.yaml. Raises StackError if the expression is
    malformed, the zone is unknown, or the rule has no date in the coming years.
    """
    default = _default_rule()
    present = present or {}
    if present and not cron and "cron" not in present:
        raise StackError(
            "the present schedule is not a cron expression, of which the times could be taken; "
            "expected CRON as well, as in '0 3 * * 1'"
        )
    # Days of the month and the week that both have to match, as the UI can say.
    day_or = bool(cron or present.get("day_or", True))
    cron = cron or present.get("cron", default["cron"])
    zone = zone or present.get("timezone") or default["timezone"]
    if zone not in available_timezones() - _NOWHERE:
        raise StackError(f"there is no time zone {zone!r}; expected one as in Europe/Berlin")
    malformed = StackError(
        f"{cron!r} is no cron expression; expected exactly five fields, minute, hour, day, month "
        "and weekday, as in '0 3 * * 1', which is Mondays at three, or a word such as @weekly"
    )
    # Prefect accepts a sixth field, last, as seconds; other programs have seconds first. Six fields
    # could therefore mean another time than intended, so exactly five are accepted.
    if len(cron.split()) != (1 if cron.startswith("@") else 5):
        raise malformed
    try:
        rule = CronSchedule(cron=cron, timezone=zone, day_or=day_or)
    except ValidationError as error:
        raise malformed from error
    if not _ever_comes(rule):
        raise StackError(f"{cron!r} never comes; expected a time that does, as in '0 3 * * 1'")
    return rule


def check_dataset(dataset: str) -> None:
    """Raise StackError unless the data set exists: downloaded, or with its base in the store."""
    check_name(dataset)
    if dataset == AUTO:
        raise StackError(
            f"{AUTO} stands for mnist or digits, which would get a second week; expected the name "
            "of one of them: mnist or digits"
        )
    if dataset in KNOWN:  # the first run downloads it
        return
    try:
        store = open_store()
        missing = missing_archives(dataset, store)
        if missing and read_base(store, dataset) is None:
            raise StackError(
                f"there is no data set {dataset}: {store.address_of(keys.archives(dataset))} lacks "
                f"{', '.join(missing)}; upload its four archives first"
            )
    except OSError as error:  # StorageUnreachable and StorageRefused
        raise StackError(str(error)) from error


def present_rule(prefect: SyncPrefectClient, dataset: str) -> dict[str, Any] | None:
    """Return the rule of the schedule that trains the data set; None if there is none."""
    found = _found(_training(prefect), dataset)
    return dict(found["schedule"]) if found else None


def set_schedule(prefect: SyncPrefectClient, dataset: str, rule: CronSchedule) -> None:
    """Add a schedule of the data set to train/weekly, or change the one that trains it already.

    The latter may be one of deployments/prefect.yaml: a second schedule would train the data set
    twice a week. `make up` keeps the change. Raises StackError if the data set has the name of a
    schedule of that file.
    """
    training = _training(prefect)
    found = _found(training, dataset)
    if dataset in _taken():
        raise StackError(
            f"`{dataset}` is the name of a schedule in deployments/prefect.yaml; give the data set "
            "another name, or change that schedule there"
        )
    path = f"/deployments/{training['id']}/schedules"
    given = found["parameters"] if found else {}  # other parameters of the schedule stay
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
    # The server creates the runs of a deployment that was just changed at once, so the deployment
    # is written again as it is.
    _request(prefect, "PATCH", f"/deployments/{training['id']}", {"paused": training["paused"]})


def remove_schedule(prefect: SyncPrefectClient, dataset: str) -> None:
    """Remove the schedule of the data set from train/weekly; raise StackError if there is none."""
    training = _training(prefect)
    found = None if dataset in _taken() else _found(training, dataset)
    if found is None:
        raise StackError(f"{TRAINING} has no schedule of the data set {dataset}; `make schedule`")
    _request(prefect, "DELETE", f"/deployments/{training['id']}/schedules/{found['id']}", None)


def clock_change_warnings(rule: CronSchedule) -> list[str]:
    """Return a sentence for each coming clock change that drops or doubles a run of the rule."""
    wall = rule.model_copy(update={"timezone": "UTC"})  # as if the clocks never changed
    warnings = []
    for day in _clock_changes(rule.timezone or "UTC"):
        usual = _count(wall, day)
        real = _count(rule, day)
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
    """Return the midnights at the start and the end of a day, in its time zone."""
    midnight = datetime.combine(day, time(), ZoneInfo(zone or "UTC"))
    return midnight, midnight + timedelta(days=1)  # by the clock, however long the day is


def _count(rule: CronSchedule, day: date) -> int:
    """Return the number of runs of a rule on a day of its time zone."""
    # In UTC, where every hour has 60 minutes.
    begin, end = (bound.astimezone(UTC) for bound in _bounds(day, rule.timezone))
    runs = set[datetime]()
    while begin < end:
        piece = _dates(rule, begin, min(begin + _PIECE, end), _PIECE // timedelta(minutes=1) + 1)
        runs |= {each.astimezone(UTC) for each in piece}
        begin += _PIECE
    # `get_dates` includes the end itself, which belongs to the next day.
    return len(runs - {end})


def _dates(rule: CronSchedule, start: datetime, end: datetime, number: int) -> list[datetime]:
    """Return the first `number` dates of a rule in an interval."""
    return list(asyncio.run(rule.get_dates(n=number, start=start, end=end)))


def _ever_comes(rule: CronSchedule) -> bool:
    """Return True if a rule has a date in the next eight years."""
    now = datetime.now(UTC)  # eight years, since a rule may be for the 29th of February
    try:
        return bool(_dates(rule, now, now + 4 * _YEARS_AHEAD, 1))
    except ValueError:  # a date that does not exist, such as the 31st of February
        return False


def _default_rule() -> dict[str, str]:
    return next(entry for entry in _file_schedules() if entry["slug"] == "weekly")


def _taken() -> set[str]:
    """Return the names of the schedules in deployments/prefect.yaml."""
    return {entry["slug"] for entry in _file_schedules()}


def _file_schedules() -> list[dict[str, str]]:
    """Return the schedules of train/weekly in deployments/prefect.yaml."""
    file = yaml.safe_load((PROJECT / "deployments" / "prefect.yaml").read_text())
    (training,) = (
        each for each in file["deployments"] if each["entrypoint"] == "flows.train.train"
    )
    return list(training["schedules"])


def _training(prefect: SyncPrefectClient) -> dict[str, Any]:
    """Return the deployment train/weekly; raise StackError if the server has none."""
    try:
        found = _request(prefect, "GET", f"/deployments/name/{TRAINING}", None)
    except PrefectHTTPStatusError as error:
        raise StackError(
            f"{prefect.api_url} has no deployment {TRAINING} ({error.response.status_code}); "
            "deploy deployments/prefect.yaml there, or `make up` for the local stack"
        ) from error
    return dict(found)


def _found(training: dict[str, Any], dataset: str) -> dict[str, Any] | None:
    """Return the schedule with the data set's name, else the one that trains it."""
    own = [each for each in training["schedules"] if each["slug"] == dataset]
    its = [each for each in training["schedules"] if dataset_of(training, each) == dataset]
    return next(iter(own + its), None)


def _request(prefect: SyncPrefectClient, method: Any, path: Any, content: object) -> Any:
    response = prefect.request(method, path, json=content)
    return response.json() if response.content else None


if __name__ == "__main__":
    sys.exit(main())
