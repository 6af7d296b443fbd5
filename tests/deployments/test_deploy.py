"""What people changed on the server stays over a deployment, and is told."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.deploy import Merge, Record, _merge_settings, deploy, merge, set_automations
from deployments.due import Ask
from deployments.stack import PROJECT, Stack, prefect_api

OLD, NEW, EDITED = "old", "new", "edited"


@pytest.mark.parametrize(
    ("ours", "last", "theirs", "expected"),
    [
        (NEW, None, None, Merge(write={"x": NEW})),
        (NEW, OLD, OLD, Merge(write={"x": NEW})),
        (OLD, OLD, OLD, Merge()),
        (OLD, OLD, EDITED, Merge(kept={"x": EDITED})),
        (NEW, OLD, EDITED, Merge(kept={"x": EDITED})),
        (OLD, OLD, None, Merge(kept={"x": None})),
        (NEW, None, EDITED, Merge(kept={"x": EDITED})),
        (None, OLD, OLD, Merge(remove=["x"])),
        (None, OLD, EDITED, Merge(kept={"x": EDITED})),
        (None, OLD, None, Merge()),
        (None, None, EDITED, Merge()),
    ],
)
def test_the_file_holds_where_nobody_changed_anything_and_else_the_server(
    ours: str | None, last: str | None, theirs: str | None, expected: Merge
) -> None:
    named = ({"x": each} if each else {} for each in (ours, last, theirs))
    assert merge(*named, reset=False) == expected


@pytest.mark.parametrize("theirs", [EDITED, OLD, None])
def test_a_reset_takes_what_the_file_says(theirs: str | None) -> None:
    present = {"x": theirs} if theirs else {}
    assert merge({"x": NEW}, {"x": OLD}, present, reset=True) == Merge(write={"x": NEW})


def test_a_reset_leaves_alone_what_the_file_never_had() -> None:
    assert merge({}, {}, {"x": EDITED}, reset=True) == Merge()


@pytest.fixture
def ask(stack: Stack) -> Iterator[Ask]:
    """Ask the session's server; what was edited on it is undone in the end."""
    with prefect_api(stack) as ask:
        yield ask
        set_automations(ask, stack, reset=True, say=print)
        deploy(ask, stack, YAML, reset=True, say=print)
        training = ask("GET", "/deployments/name/train/weekly", None)
        for added in (each for each in training["schedules"] if each["slug"] == "letters"):
            ask("DELETE", f"/deployments/{training['id']}/schedules/{added['id']}", None)


YAML = PROJECT / "deployments" / "prefect.yaml"


def automation(ask: Ask, name: str) -> dict[str, Any] | None:
    found = ask("POST", "/automations/filter", {})
    return next((each for each in found if each["name"] == name), None)


def schedules(ask: Ask, deployment: str) -> dict[str, Any]:
    found = ask("GET", f"/deployments/name/{deployment}", None)["schedules"]
    return {each["slug"]: each for each in found}


EDITS: dict[str, Any] = {
    "description": "",
    "tags": ["mnist-retraining", "ours"],
    "job_variables": {"env": {"TOKEN": "{{ prefect.blocks.secret.token }}"}},
    "work_pool_name": "local",
    "work_queue_name": "fast",
    "concurrency_limit": 2,
    "concurrency_options": {"collision_strategy": "CANCEL_NEW"},
    "enforce_parameter_schema": False,
}
"""Settings of a deployment as Prefect's API takes them, with a secret that does not exist."""


def found_edits(ask: Ask) -> dict[str, Any]:
    """Return what train/weekly has of what EDITS changes."""
    found = ask("GET", "/deployments/name/train/weekly", None)
    limit = found["global_concurrency_limit"]
    found["concurrency_limit"] = limit and limit["limit"]
    if options := found["concurrency_options"]:
        found["concurrency_options"] = {"collision_strategy": options["collision_strategy"]}
    return {name: found[name] for name in EDITS}


def edit_in_the_ui(ask: Ask) -> None:
    """Do what a person may do there: edit, switch, pause, add and remove."""
    training = ask("GET", "/deployments/name/train/weekly", None)
    path = f"/deployments/{training['id']}"
    monday, berlin = f"{path}/schedules/{training['schedules'][0]['id']}", "Europe/Berlin"
    rule = {"cron": "0 5 * * 1", "timezone": berlin}
    ask("PATCH", monday, {"slug": "weekly", "schedule": rule, "active": False})
    own = {"slug": "letters", "schedule": rule, "parameters": {"dataset": "letters"}}
    ask("POST", f"{path}/schedules", [own])
    ask("PATCH", path, {"paused": True, **EDITS})
    retention = ask("GET", "/deployments/name/retain/weekly", None)
    gone = retention["schedules"][0]["id"]
    ask("DELETE", f"/deployments/{retention['id']}/schedules/{gone}", None)
    switched, removed = (
        automation(ask, name) for name in ("train-on-accepted-batches", "ingest-after-arrivals")
    )
    assert switched
    assert removed
    ask("PATCH", f"/automations/{switched['id']}", {"enabled": False})
    ask("DELETE", f"/automations/{removed['id']}", None)
    silent = automation(ask, "crash-silent-runs")
    assert silent
    edited = {key: silent[key] for key in ("name", "description", "enabled", "trigger", "actions")}
    edited["trigger"]["within"] = 600
    ask("PUT", f"/automations/{silent['id']}", edited)


def test_what_a_person_changed_in_the_ui_stays_and_is_told_until_a_reset(
    stack: Stack, ask: Ask
) -> None:
    before, said = found_edits(ask), list[str]()
    edit_in_the_ui(ask)
    set_automations(ask, stack, say=said.append)
    deploy(ask, stack, YAML, say=said.append)

    theirs = schedules(ask, "train/weekly")
    assert theirs["weekly"]["schedule"]["cron"] == "0 5 * * 1"
    assert not theirs["weekly"]["active"]
    assert theirs["letters"]["parameters"] == {"dataset": "letters"}
    assert ask("GET", "/deployments/name/train/weekly", None)["paused"]
    assert found_edits(ask) == EDITS
    assert schedules(ask, "retain/weekly") == {}
    switched = automation(ask, "train-on-accepted-batches")
    assert switched
    assert not switched["enabled"]
    assert automation(ask, "ingest-after-arrivals") is None
    silent = automation(ask, "crash-silent-runs")
    assert silent
    assert silent["trigger"]["within"] == 600
    assert sorted(sentence for sentence in said if sentence.endswith("kept")) == [
        "ingest/on-arrival: the automation `ingest-after-arrivals` is removed on the server; kept",
        (
            "retain/weekly: the schedule `weekly` is removed on the server, "
            "'0 6 * * 1' Etc/UTC in prefect.yaml; kept"
        ),
        *(
            f"train/weekly has another {setting} on the server than in prefect.yaml; kept"
            for setting in (
                "check of parameters",
                "concurrency limit",
                "description",
                "set of job variables",
                "set of tags",
                "work pool or queue",
            )
        ),
        "train/weekly is paused on the server; kept",
        (
            "train/weekly: the automation `train-on-accepted-batches` is switched off on the "
            "server; kept"
        ),
        (
            "train/weekly: the schedule `weekly` is '0 5 * * 1' Europe/Berlin, switched off on the "
            "server, '0 3 * * 1' Etc/UTC in prefect.yaml; kept"
        ),
    ]
    assert any("`crash-silent-runs` has another trigger on the server" in each for each in said)

    set_automations(ask, stack, reset=True, say=said.append)
    deploy(ask, stack, YAML, reset=True, say=said.append)
    assert schedules(ask, "train/weekly")["weekly"]["schedule"]["cron"] == "0 3 * * 1"
    assert schedules(ask, "train/weekly")["weekly"]["active"]
    assert not ask("GET", "/deployments/name/train/weekly", None)["paused"]
    assert found_edits(ask) == before
    assert "train/weekly: its set of tags is now as in prefect.yaml" in said
    assert schedules(ask, "retain/weekly").keys() == {"weekly"}
    assert automation(ask, "ingest-after-arrivals")
    assert "letters" in schedules(ask, "train/weekly")  # the file says nothing of it


def test_a_newer_file_is_deployed_where_nobody_changed_anything(
    stack: Stack, ask: Ask, tmp_path: Path
) -> None:
    file = yaml.safe_load(YAML.read_text())
    (training,) = (
        each for each in file["deployments"] if each["entrypoint"] == "flows.train.train"
    )
    training["schedules"][0]["cron"] = "0 4 * * 1"
    training["schedules"].append({"slug": "also", "cron": "0 4 * * 4", "timezone": "Etc/UTC"})
    training["description"] = "Newer."
    training["work_pool"]["job_variables"]["env"]["NEWER"] = "1"  # of all: it is one anchor
    path = f"/deployments/{ask('GET', '/deployments/name/train/weekly', None)['id']}"
    ask("PATCH", path, {"tags": ["mnist-retraining", "ours"]})
    newer, said = tmp_path / "prefect.yaml", list[str]()
    newer.write_text(yaml.safe_dump(file))
    deploy(ask, stack, newer, say=said.append)
    theirs = schedules(ask, "train/weekly")
    assert theirs["weekly"]["schedule"]["cron"] == "0 4 * * 1"
    assert theirs["also"]["active"]
    assert found_edits(ask)["description"] == "Newer."
    assert found_edits(ask)["job_variables"]["env"]["NEWER"] == "1"
    assert found_edits(ask)["tags"] == ["mnist-retraining", "ours"]
    assert [sentence for sentence in said if sentence.startswith("train/weekly")] == [
        "train/weekly has another set of tags on the server than in prefect.yaml; kept",
        "train/weekly: its description is now as in prefect.yaml",
        "train/weekly: its set of job variables is now as in prefect.yaml",
        "train/weekly: the schedule `weekly` is now '0 4 * * 1' Etc/UTC",
    ]
    deploy(ask, stack, YAML, say=said.append)
    assert "also" not in schedules(ask, "train/weekly")


def test_settings_that_an_older_version_did_not_record_are_the_files() -> None:
    """It deployed the file's every time: what differs is the file, which is newer."""
    entry = {"name": "weekly", "entrypoint": "flows.train.train", "description": NEW}
    present = {
        "paused": True,
        "parameters": {},
        "description": OLD,
        "tags": [],
        "job_variables": {},
        "enforce_parameter_schema": True,
        "work_pool_name": None,  # it was removed
        "work_queue_name": None,
        "global_concurrency_limit": None,
        "concurrency_options": None,
    }
    settings = {"paused": False, "parameters": {}}
    older = Record(deployments={"flows.train.train/weekly": {"settings": settings}})
    for record in (older, Record()):
        changes = _merge_settings(entry, present, record, reset=False)
        assert changes == Merge(write={"description": NEW}, kept={"paused": True})


def test_a_deployment_that_was_cut_short_loses_no_edit(
    stack: Stack, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefect has removed the automations by then, and they are not yet given back."""
    switched = automation(ask, "train-on-accepted-batches")
    assert switched
    ask("PATCH", f"/automations/{switched['id']}", {"enabled": False})
    with monkeypatch.context() as patch:
        patch.setattr("deployments.deploy._set_schedules", interrupt)
        with pytest.raises(KeyboardInterrupt):
            deploy(ask, stack, YAML, say=print)
    made_anew = automation(ask, "train-on-accepted-batches")
    assert made_anew
    assert made_anew["enabled"]
    deploy(ask, stack, YAML, say=print)
    given_back = automation(ask, "train-on-accepted-batches")
    assert given_back
    assert not given_back["enabled"]


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt
