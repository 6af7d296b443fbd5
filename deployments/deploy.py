"""Deploy prefect.yaml to the local Prefect server, and keep the changes made on the server.

`prefect deploy` creates schedules and triggers anew, which undoes every switch and edit that was
made in the UI. This module is a three-way merge of the file, the server, and the file as it was
last deployed (a record in the stack's folder). Where server and record agree, nobody has changed
anything, and the file applies; else the server's version is kept, and reported.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from deployments import processes
from deployments.due import Ask
from deployments.services import POOL, PROJECT, Stack, StackError, inherited_environment

Named = dict[str, Any]
"""Schedules, automations or settings by name; also one such object as JSON."""

_RESET = "`make up RESET=1` takes what the files say."

_SETTINGS = {
    "paused": "pause switch",
    "parameters": "set of parameters",
    "description": "description",
    "tags": "set of tags",
    "work_pool": "work pool or queue",
    "job_variables": "set of job variables",
    "concurrency": "concurrency limit",
    "enforce_parameter_schema": "check of parameters",
}
"""Editable settings of a deployment besides its schedules, as nouns for a sentence."""


@dataclass(frozen=True)
class Merge:
    """Result of a three-way merge: the names to write, to remove, and to keep as on the server."""

    write: Named = field(default_factory=dict)
    remove: list[str] = field(default_factory=list)
    kept: Named = field(default_factory=dict)
    """The server's versions; None for a name that was removed there."""


@dataclass
class Record:
    """The last deployment, stored as `deployed.json` in the stack's folder."""

    automations: Named = field(default_factory=dict)
    deployments: dict[str, dict[str, Named]] = field(default_factory=dict)
    interrupted: dict[str, list[Any]] = field(default_factory=dict)
    """Automations of each deployment, by its id, from before `prefect deploy` removed them.

    Empty once a deployment has finished. After an interrupted one it still holds the state from
    before the first attempt, since the server has lost it.
    """

    @classmethod
    def read(cls, stack: Stack) -> "Record":
        """Read the record; return an empty one if nothing was deployed yet."""
        path = _record_path(stack)
        return cls(**json.loads(path.read_text())) if path.exists() else cls()

    def write(self, stack: Stack) -> None:
        """Write the record atomically."""
        draft = _record_path(stack).with_suffix(".draft")
        draft.write_text(json.dumps(vars(self), indent=1))
        draft.replace(_record_path(stack))


def merge(wanted: Named, last: Named, present: Named, *, reset: bool) -> Merge:
    """Merge three versions by name: `wanted` by the file, `last` deployed, `present` on the server.

    A name that is missing from a version counts as removed there. `reset` keeps nothing: the file
    overrides the server.
    """
    result = Merge()
    # Names that neither file has were created on the server, and stay untouched.
    for name in sorted(wanted.keys() | last.keys()):
        ours = wanted.get(name)
        theirs = present.get(name)
        if ours == theirs:
            continue
        if not reset and theirs != last.get(name):  # edited on the server since the last deployment
            result.kept[name] = theirs
        elif ours is None:
            result.remove.append(name)
        else:
            result.write[name] = ours
    return result


def set_automations(
    ask: Ask, stack: Stack, *, reset: bool = False, say: Callable[[str], None]
) -> None:
    """Create or update the automations of deployments/automations.yaml.

    Edits that were made on the server are kept and reported by `say`, unless `reset`.
    """
    file = yaml.safe_load((PROJECT / "deployments" / "automations.yaml").read_text())
    record = Record.read(stack)
    wanted = {each["name"]: _normal(each) for each in file["automations"]}
    found = {each["name"]: each for each in ask("POST", "/automations/filter", {})}
    # The server adds fields of its own, which must not count as an edit.
    known = {**record.automations, **wanted}
    present = {name: project(_normal(found[name]), known[name]) for name in known if name in found}
    changes = merge(wanted, record.automations, present, reset=reset)
    for name, automation in changes.write.items():
        if name in found:
            ask("PUT", f"/automations/{found[name]['id']}", automation)
        else:
            ask("POST", "/automations/", automation)
    for name in changes.remove:
        ask("DELETE", f"/automations/{found[name]['id']}", None)
    record.automations = wanted
    record.write(stack)
    for name, theirs in changes.kept.items():
        say(f"{_describe_automation(name, wanted.get(name), theirs)}; kept. {_RESET}")


def deploy(
    ask: Ask,
    stack: Stack,
    prefect_yaml: Path,
    *,
    reset: bool = False,
    say: Callable[[str], None],
) -> None:
    """Deploy a prefect.yaml; report by `say` each update and each edit that is kept.

    `reset` keeps no edits. Raises StackError if `prefect deploy` fails.
    """
    file = yaml.safe_load(prefect_yaml.read_text())
    record = Record.read(stack)
    before = _deployments(ask)
    # Saved before `prefect deploy` replaces the triggers, so that a retry after a crash can still
    # restore them. A record of an interrupted attempt is older and therefore stays.
    if not record.interrupted:
        record.interrupted = {
            deployment["id"]: _automations_of(ask, deployment) for deployment in before.values()
        }
        record.write(stack)
    settings = {
        _key(entry): _merge_settings(entry, before.get(_key(entry)), record, reset=reset)
        for entry in file["deployments"]
    }
    entries = [_with_settings(entry, settings[_key(entry)].kept) for entry in file["deployments"]]
    _run_prefect_deploy(stack, file | {"deployments": entries}, prefect_yaml)
    after = _deployments(ask)
    sentences: list[str] = []
    for entry in file["deployments"]:
        deployment = after[_key(entry)]
        last = record.deployments.setdefault(_key(entry), {})
        sentences += _keep_settings(ask, deployment, settings[_key(entry)])
        sentences += _set_schedules(ask, deployment, entry, last, reset=reset)
        earlier = record.interrupted.get(deployment["id"], [])
        sentences += _restore_triggers(ask, deployment, earlier, last, reset=reset)
        last["settings"] = _settings_of_file(entry)
    record.interrupted = {}
    record.write(stack)
    for sentence in sentences:
        say(sentence)
    if any(sentence.endswith("kept") for sentence in sentences):
        say(_RESET)


def project(found: Any, wanted: Any) -> Any:
    """Return `found` without the fields that `wanted` lacks: those that the server added.

    Applies to nested objects, and item by item to lists of equal length.
    """
    if isinstance(found, dict) and isinstance(wanted, dict):
        return {key: project(value, wanted[key]) for key, value in found.items() if key in wanted}
    if isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        return [project(*pair) for pair in zip(found, wanted, strict=True)]
    return found


def _run_prefect_deploy(stack: Stack, file: Named, prefect_yaml: Path) -> None:
    """Run `prefect deploy` without the schedules, which it would replace."""
    entries = [
        {key: value for key, value in entry.items() if key != "schedules"}
        for entry in file["deployments"]
    ]
    copy = stack.root / "prefect.yaml"
    copy.write_text(yaml.safe_dump(file | {"deployments": entries}, sort_keys=False))
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    log = stack.log("deploy")
    with log.open("wb") as output:
        done = subprocess.run(
            [*command, "--prefect-file", str(copy)],
            env=inherited_environment(stack),
            cwd=PROJECT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode != 0:
        raise StackError(f"{prefect_yaml} was not deployed. {processes.tail(log)}")


def _set_schedules(
    ask: Ask, deployment: Named, entry: Named, last: Named, *, reset: bool
) -> list[str]:
    """Update the schedules of a deployment; return a sentence for each change and kept edit.

    Records the file's schedules in `last`.
    """
    wanted = {each["slug"]: _schedule_of_file(each) for each in entry.get("schedules", [])}
    found = {_schedule_name(each, wanted): each for each in deployment["schedules"]}
    present = {name: _schedule_of_server(each) for name, each in found.items()}
    changes = merge(wanted, last.get("schedules", {}), present, reset=reset)
    path = f"/deployments/{deployment['id']}/schedules"
    # Schedules of old have no slug. It is set now, while their rule still identifies them.
    nameless = [name for name in found if name in wanted and not found[name]["slug"]]
    for name in nameless:
        ask("PATCH", f"{path}/{found[name]['id']}", present[name] | {"slug": name})
    for name, content in changes.write.items():
        if name in found:
            ask("PATCH", f"{path}/{found[name]['id']}", content | {"slug": name})
        else:
            ask("POST", path, [content | {"slug": name}])
    for name in changes.remove:
        ask("DELETE", f"{path}/{found[name]['id']}", None)
    # The server creates the runs of a deployment that was just changed at once, so the deployment
    # is written again as it is.
    if changes.write:
        ask("PATCH", f"/deployments/{deployment['id']}", {"paused": deployment["paused"]})
    last["schedules"] = wanted
    label = f"{_label(deployment)}: the schedule"
    updated = {name: content for name, content in changes.write.items() if name in found}
    return [
        *(f"{label} `{name}` is now {_describe_rule(each)}" for name, each in updated.items()),
        *(f"{label} `{name}` is removed, as in prefect.yaml" for name in changes.remove),
        *(
            f"{label} `{name}` is {_describe_rule(theirs)} on the server, "
            f"{_describe_rule(wanted.get(name))} in prefect.yaml; kept"
            for name, theirs in changes.kept.items()
        ),
    ]


def _restore_triggers(
    ask: Ask, deployment: Named, earlier: list[Named], last: Named, *, reset: bool
) -> list[str]:
    """Restore the edits of triggers, which `prefect deploy` has just created anew.

    `earlier` are the deployment's automations from before. Returns a sentence for each kept edit,
    and records the file's triggers in `last`.
    """
    # A trigger of the file gets a new id each time; an automation that `prefect deploy` leaves
    # alone keeps its id, and is in both lists.
    now = _automations_of(ask, deployment)
    made = _new(now, besides=earlier)
    wanted = {name: _automation_content(each) for name, each in made.items()}
    lost = {name: _automation_content(each) for name, each in _new(earlier, besides=now).items()}
    known = last.get("triggers", {})
    changes = merge(wanted, known, lost, reset=reset)
    last["triggers"] = wanted
    # Lost triggers that neither this file nor the last one has: a person made them, so they are
    # restored without a report.
    strangers = {} if reset else {name: lost[name] for name in lost.keys() - wanted - known.keys()}
    for name, theirs in {**changes.kept, **strangers}.items():
        if theirs is None:
            ask("DELETE", f"/automations/{made[name]['id']}", None)
        elif name in made:
            ask("PUT", f"/automations/{made[name]['id']}", theirs)
        else:
            owner = {"owner_resource": f"prefect.deployment.{deployment['id']}"}
            ask("POST", "/automations/", theirs | owner)
    return [
        f"{_label(deployment)}: {_describe_automation(name, wanted.get(name), theirs)}; kept"
        for name, theirs in changes.kept.items()
    ]


def _merge_settings(entry: Named, present: Named | None, record: Record, *, reset: bool) -> Merge:
    """Merge the settings of a deployment besides its schedules; `present` is None if it is new."""
    if present is None:
        return Merge()
    ours = _settings_of_file(entry)
    theirs = _settings_of_server(present)
    # Without a record the file's values stand for the last ones, so that a difference is kept.
    first = {name: ours[name] for name in ("paused", "parameters")}
    recorded = record.deployments.get(_key(entry), {}).get("settings", first)
    # Older versions recorded fewer settings and deployed the file's values of the others every
    # time: for those the server's value is the last one, so that the file applies.
    return merge(ours, theirs | recorded, theirs, reset=reset)


def _with_settings(entry: Named, kept: Named) -> Named:
    """Return an entry of prefect.yaml with the kept settings filled in.

    Values with placeholders are left out: `prefect deploy` would resolve at once a placeholder that
    a run resolves as it begins. `_keep_settings` writes them afterwards.
    """
    plain = {name: value for name, value in kept.items() if "{{" not in json.dumps(value)}
    settings = _settings_of_file(entry) | plain
    pool = settings["work_pool"]
    limit = settings.pop("concurrency")
    number = limit["concurrency_limit"]
    options = limit["concurrency_options"]
    settings["work_pool"] = {
        "name": pool["work_pool_name"],
        "work_queue_name": pool["work_queue_name"],
        "job_variables": settings.pop("job_variables"),
    }
    return entry | settings | {"concurrency_limit": number and {"limit": number, **options}}


def _keep_settings(ask: Ask, deployment: Named, settings: Merge) -> list[str]:
    """Write the kept settings as they were; return a sentence for each change and kept edit."""
    if settings.kept:
        kept = dict(settings.kept)
        # These two are objects of several fields here, and separate fields in the API.
        groups = [kept.pop(name, {}) for name in ("work_pool", "concurrency")]
        ask("PATCH", f"/deployments/{deployment['id']}", {**kept, **groups[0], **groups[1]})
    label = _label(deployment)
    return [
        *(f"{label} {_describe_setting(*setting)}; kept" for setting in settings.kept.items()),
        *(f"{label}: its {_SETTINGS[name]} is now as in prefect.yaml" for name in settings.write),
    ]


def _settings_of_file(entry: Named) -> Named:
    pool = entry.get("work_pool", {})
    return {
        "paused": entry.get("paused", False),
        "parameters": entry.get("parameters", {}),
        "description": entry.get("description"),
        "tags": sorted(entry.get("tags", [])),
        "work_pool": _work_pool(pool.get("name"), pool.get("work_queue_name")),
        "job_variables": pool.get("job_variables", {}),
        "concurrency": _concurrency(entry.get("concurrency_limit")),
        "enforce_parameter_schema": entry.get("enforce_parameter_schema", True),
    }


def _settings_of_server(found: Named) -> Named:
    limit = found["global_concurrency_limit"]
    options = found["concurrency_options"] or {}
    same = _SETTINGS.keys() - {"tags", "work_pool", "concurrency"}
    return {name: found[name] for name in same} | {
        "tags": sorted(found["tags"]),
        "work_pool": _work_pool(found["work_pool_name"], found["work_queue_name"]),
        "concurrency": _concurrency({"limit": limit["limit"], **options} if limit else None),
    }


def _work_pool(name: str | None, queue: str | None) -> Named:
    """Return pool and queue by the API's field names, with the defaults for None.

    The server has none if the pool was removed.
    """
    return {"work_pool_name": name or POOL, "work_queue_name": queue or "default"}


def _concurrency(limit: Named | None) -> Named:
    """Return a limit of prefect.yaml by the API's field names."""
    if limit is None:
        return {"concurrency_limit": None, "concurrency_options": None}
    # The defaults are filled in for file and server alike, so that equal limits compare equal.
    options = {"collision_strategy": "ENQUEUE", "grace_period_seconds": None, **limit}
    return {"concurrency_limit": options.pop("limit"), "concurrency_options": options}


def _describe_setting(name: str, theirs: Any) -> str:
    """Describe an edited setting; job variables may hold secrets, which are not shown."""
    if name == "paused":
        return "is paused on the server" if theirs else "is not paused on the server"
    if name == "parameters":
        return f"is given {theirs} on the server"
    return f"has another {_SETTINGS[name]} on the server than in prefect.yaml"


def _deployments(ask: Ask) -> dict[str, Named]:
    """Return the server's deployments by `_key`, each with the name of its flow."""
    flows = {flow["id"]: flow["name"] for flow in ask("POST", "/flows/filter", {})}
    found = ask("POST", "/deployments/filter", {})
    return {_key(each): each | {"flow_name": flows[each["flow_id"]]} for each in found}


def _key(deployment: Named) -> str:
    """Return the key of a deployment that the file and the server have in common."""
    return f"{deployment['entrypoint']}/{deployment['name']}"


def _label(deployment: Named) -> str:
    return f"{deployment['flow_name']}/{deployment['name']}"


def _schedule_name(found: Named, wanted: Named) -> str:
    """Return a schedule's slug, else that of the wanted schedule with the same rule, else its id.

    Only schedules of old have no slug.
    """
    rule = _schedule_of_server(found)["schedule"]
    alike = (name for name, content in wanted.items() if content["schedule"] == rule)
    return str(found["slug"] or next(alike, found["id"]))


def _schedule_of_file(entry: Named) -> Named:
    rule = {key: entry[key] for key in ("cron", "interval", "rrule", "timezone") if key in entry}
    parameters = entry.get("parameters", {})
    return {"schedule": rule, "active": entry.get("active", True), "parameters": parameters}


def _schedule_of_server(found: Named) -> Named:
    content = {"slug": found["slug"], **found["schedule"]}
    return _schedule_of_file(content | {key: found[key] for key in ("active", "parameters")})


def _describe_rule(content: Named | None) -> str:
    if content is None:
        return "removed"
    rule = content["schedule"]
    words = f"'{rule.get('cron') or rule.get('interval') or rule.get('rrule')}'"
    words += f" {rule['timezone']}" if rule.get("timezone") else ""
    words += f" with {content['parameters']}" if content["parameters"] else ""
    return words if content["active"] else f"{words}, switched off"


def _automations_of(ask: Ask, deployment: Named) -> list[Named]:
    found = ask("GET", f"/automations/related-to/prefect.deployment.{deployment['id']}", None)
    return list(found)


def _automation_content(found: Named) -> Named:
    """Return the editable fields of an automation, without ids.

    The ids change whenever an automation is created anew, and would count as an edit.
    """
    names = ("name", "description", "enabled", "tags", "trigger")
    steps = ("actions", "actions_on_trigger", "actions_on_resolve")
    content: Named = _normal({name: found[name] for name in (*names, *steps)})
    return content | {"trigger": _without_ids(content["trigger"])}


def _without_ids(trigger: Any) -> Any:
    if isinstance(trigger, dict):
        return {key: _without_ids(value) for key, value in trigger.items() if key != "id"}
    return [_without_ids(each) for each in trigger] if isinstance(trigger, list) else trigger


def _normal(value: Any) -> Any:
    """Sort every list of strings, at any depth: the server stores them as sets, in any order."""
    if isinstance(value, dict):
        return {key: _normal(each) for key, each in value.items()}
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return sorted(value)
    return [_normal(each) for each in value] if isinstance(value, list) else value


def _new(automations: list[Named], *, besides: list[Named]) -> Named:
    """Return, by name, the automations whose ids are not among those of `besides`."""
    known = {each["id"] for each in besides}
    return {each["name"]: each for each in automations if each["id"] not in known}


def _describe_automation(name: str, ours: Named | None, theirs: Named | None) -> str:
    if theirs is None:
        return f"the automation `{name}` is removed on the server"
    if ours is None:
        return f"the automation `{name}` is edited on the server, removed in the file"
    fields = [key for key in ours if theirs.get(key) != ours[key]]
    if fields == ["enabled"]:
        switched = "on" if theirs["enabled"] else "off"
        return f"the automation `{name}` is switched {switched} on the server"
    return (
        f"the automation `{name}` has another {' and '.join(fields)} on the server than in the file"
    )


def _record_path(stack: Stack) -> Path:
    return stack.root / "deployed.json"
