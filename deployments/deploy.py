"""Bring the local Prefect server up to prefect.yaml; what people changed on the server stays.

`prefect deploy` makes schedules and triggers anew, which undoes what people switched and edited in
the UI. Here three states meet: the file, the server, and what the file was when it was deployed
last (a record in the stack's folder). Where server and record agree nobody changed anything, and
the file holds; else the server's word stays, and is told.
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
"""Schedules, automations or settings by their names."""

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
"""What people can edit of a deployment besides its schedules, in words for a sentence."""


@dataclass(frozen=True)
class Merge:
    """What the server gets, and what stays as people changed it there."""

    write: Named = field(default_factory=dict)
    remove: list[str] = field(default_factory=list)
    kept: Named = field(default_factory=dict)
    """None stands for what was removed on the server, or is in the file no longer."""


@dataclass
class Record:
    """What was deployed last, in a file of the stack."""

    automations: Named = field(default_factory=dict)
    deployments: dict[str, dict[str, Named]] = field(default_factory=dict)
    interrupted: dict[str, list[Any]] = field(default_factory=dict)
    """Automations that a deployment owned before `prefect deploy` removed them, by its id."""

    @classmethod
    def read(cls, stack: Stack) -> "Record":
        """Read the record; an empty one if nothing was deployed yet."""
        path = _record_path(stack)
        return cls(**json.loads(path.read_text())) if path.exists() else cls()

    def write(self, stack: Stack) -> None:
        """Write the record, whole or not at all."""
        draft = _record_path(stack).with_suffix(".draft")
        draft.write_text(json.dumps(vars(self), indent=1))
        draft.replace(_record_path(stack))


def merge(wanted: Named, last: Named, present: Named, *, reset: bool) -> Merge:
    """Decide what becomes of each name: `wanted` is the file's, `last` what it was before."""
    result = Merge()
    for name in sorted(wanted.keys() | last.keys()):
        ours, theirs = wanted.get(name), present.get(name)
        if ours == theirs:
            continue
        if not reset and theirs != last.get(name):
            result.kept[name] = theirs
        elif ours is None:
            result.remove.append(name)
        else:
            result.write[name] = ours
    return result


def set_automations(
    ask: Ask, stack: Stack, *, reset: bool = False, say: Callable[[str], None]
) -> None:
    """Make the automations of deployments/automations.yaml, or bring them up to date."""
    file = yaml.safe_load((PROJECT / "deployments" / "automations.yaml").read_text())
    record = Record.read(stack)
    wanted = {each["name"]: _normal(each) for each in file["automations"]}
    found = {each["name"]: each for each in ask("POST", "/automations/filter", {})}
    # The server adds fields of its own.
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
        say(f"{_automation_words(name, wanted.get(name), theirs)}; kept. {_RESET}")


def deploy(
    ask: Ask,
    stack: Stack,
    prefect_yaml: Path,
    *,
    reset: bool = False,
    say: Callable[[str], None],
) -> None:
    """Deploy a prefect.yaml. Raises StackError."""
    file, record = yaml.safe_load(prefect_yaml.read_text()), Record.read(stack)
    before = _deployments(ask)
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
    after, told = _deployments(ask), list[str]()
    for entry in file["deployments"]:
        deployment, last = after[_key(entry)], record.deployments.setdefault(_key(entry), {})
        told += _keep_settings(ask, deployment, settings[_key(entry)])
        told += _set_schedules(ask, deployment, entry, last, reset=reset)
        earlier = record.interrupted.get(deployment["id"], [])
        told += _restore_triggers(ask, deployment, earlier, last, reset=reset)
        last["settings"] = _settings_of_file(entry)
    record.interrupted = {}
    record.write(stack)
    for sentence in told:
        say(sentence)
    if any(sentence.endswith("kept") for sentence in told):
        say(_RESET)


def project(found: Any, wanted: Any) -> Any:
    """Return what is found without the fields that are not wanted, which the server added."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        return {key: project(value, wanted[key]) for key, value in found.items() if key in wanted}
    if isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        return [project(*pair) for pair in zip(found, wanted, strict=True)]
    return found


def _run_prefect_deploy(stack: Stack, file: Named, prefect_yaml: Path) -> None:
    """Let Prefect make the deployments, without their schedules: it would replace them."""
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
    """Bring the schedules of a deployment up to date; return what was changed or kept."""
    wanted = {each["slug"]: _schedule_of_file(each) for each in entry.get("schedules", [])}
    found = {_schedule_name(each, wanted): each for each in deployment["schedules"]}
    present = {name: _schedule_of_server(each) for name, each in found.items()}
    changes = merge(wanted, last.get("schedules", {}), present, reset=reset)
    path = f"/deployments/{deployment['id']}/schedules"
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
    if changes.write:  # the server makes the runs of a deployment that was just changed at once
        ask("PATCH", f"/deployments/{deployment['id']}", {"paused": deployment["paused"]})
    last["schedules"] = wanted
    label = f"{_label(deployment)}: the schedule"
    moved = {name: content for name, content in changes.write.items() if name in found}
    return [
        *(f"{label} `{name}` is now {_rule_words(content)}" for name, content in moved.items()),
        *(f"{label} `{name}` is removed, as in prefect.yaml" for name in changes.remove),
        *(
            f"{label} `{name}` is {_rule_words(theirs)} on the server, "
            f"{_rule_words(wanted.get(name))} in prefect.yaml; kept"
            for name, theirs in changes.kept.items()
        ),
    ]


def _restore_triggers(
    ask: Ask, deployment: Named, earlier: list[Named], last: Named, *, reset: bool
) -> list[str]:
    """Give back to triggers what people had changed; `prefect deploy` has just made them anew."""
    now = _automations_of(ask, deployment)
    made = _new(now, besides=earlier)
    wanted = {name: _automation_content(each) for name, each in made.items()}
    lost = {name: _automation_content(each) for name, each in _new(earlier, besides=now).items()}
    known = last.get("triggers", {})
    changes = merge(wanted, known, lost, reset=reset)
    last["triggers"] = wanted
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
        f"{_label(deployment)}: {_automation_words(name, wanted.get(name), theirs)}; kept"
        for name, theirs in changes.kept.items()
    ]


def _merge_settings(entry: Named, present: Named | None, record: Record, *, reset: bool) -> Merge:
    """Merge what people can edit of a deployment besides its schedules."""
    if present is None:
        return Merge()
    ours, theirs = _settings_of_file(entry), _settings_of_server(present)
    first = {name: ours[name] for name in ("paused", "parameters")}
    recorded = record.deployments.get(_key(entry), {}).get("settings", first)
    # Versions that recorded fewer settings deployed the file's values of the others every time.
    return merge(ours, theirs | recorded, theirs, reset=reset)


def _with_settings(entry: Named, kept: Named) -> Named:
    """Return an entry of prefect.yaml with settings that are kept.

    But for placeholders: `prefect deploy` would fill in at once what a run fills in as it begins.
    """
    plain = {name: value for name, value in kept.items() if "{{" not in json.dumps(value)}
    settings = _settings_of_file(entry) | plain
    pool, limit = settings["work_pool"], settings.pop("concurrency")
    number, options = limit["concurrency_limit"], limit["concurrency_options"]
    settings["work_pool"] = {
        "name": pool["work_pool_name"],
        "work_queue_name": pool["work_queue_name"],
        "job_variables": settings.pop("job_variables"),
    }
    return entry | settings | {"concurrency_limit": number and {"limit": number, **options}}


def _keep_settings(ask: Ask, deployment: Named, settings: Merge) -> list[str]:
    """Give back exactly what is kept; return what was changed or kept."""
    if settings.kept:
        kept = dict(settings.kept)
        groups = [kept.pop(name, {}) for name in ("work_pool", "concurrency")]
        ask("PATCH", f"/deployments/{deployment['id']}", {**kept, **groups[0], **groups[1]})
    label = _label(deployment)
    return [
        *(f"{label} {_setting_words(*setting)}; kept" for setting in settings.kept.items()),
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
    limit, options = found["global_concurrency_limit"], found["concurrency_options"] or {}
    same = _SETTINGS.keys() - {"tags", "work_pool", "concurrency"}
    return {name: found[name] for name in same} | {
        "tags": sorted(found["tags"]),
        "work_pool": _work_pool(found["work_pool_name"], found["work_queue_name"]),
        "concurrency": _concurrency({"limit": limit["limit"], **options} if limit else None),
    }


def _work_pool(name: str | None, queue: str | None) -> Named:
    """Return pool and queue by the API's names; the server has none if the pool was removed."""
    return {"work_pool_name": name or POOL, "work_queue_name": queue or "default"}


def _concurrency(limit: Named | None) -> Named:
    """Return a limit as in prefect.yaml by the API's names."""
    if limit is None:
        return {"concurrency_limit": None, "concurrency_options": None}
    options = {"collision_strategy": "ENQUEUE", "grace_period_seconds": None, **limit}
    return {"concurrency_limit": options.pop("limit"), "concurrency_options": options}


def _setting_words(name: str, theirs: Any) -> str:
    """Return how a setting differs; job variables may hold secrets, which are not shown."""
    if name == "paused":
        return "is paused on the server" if theirs else "is not paused on the server"
    if name == "parameters":
        return f"is given {theirs} on the server"
    return f"has another {_SETTINGS[name]} on the server than in prefect.yaml"


def _deployments(ask: Ask) -> dict[str, Named]:
    """Return the server's deployments, by what identifies one in the file."""
    flows = {flow["id"]: flow["name"] for flow in ask("POST", "/flows/filter", {})}
    found = ask("POST", "/deployments/filter", {})
    return {_key(each): each | {"flow_name": flows[each["flow_id"]]} for each in found}


def _key(deployment: Named) -> str:
    return f"{deployment['entrypoint']}/{deployment['name']}"


def _label(deployment: Named) -> str:
    return f"{deployment['flow_name']}/{deployment['name']}"


def _schedule_name(found: Named, wanted: Named) -> str:
    """Return the slug; a schedule of old has none, and is known by its rule."""
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


def _rule_words(content: Named | None) -> str:
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
    """Return what a person can edit of an automation; its ids change whenever it is made anew."""
    names = ("name", "description", "enabled", "tags", "trigger")
    steps = ("actions", "actions_on_trigger", "actions_on_resolve")
    content: Named = _normal({name: found[name] for name in (*names, *steps)})
    return content | {"trigger": _without_ids(content["trigger"])}


def _without_ids(trigger: Any) -> Any:
    if isinstance(trigger, dict):
        return {key: _without_ids(value) for key, value in trigger.items() if key != "id"}
    return [_without_ids(each) for each in trigger] if isinstance(trigger, list) else trigger


def _normal(value: Any) -> Any:
    """Sort lists of words: the server keeps them as sets."""
    if isinstance(value, dict):
        return {key: _normal(each) for key, each in value.items()}
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return sorted(value)
    return [_normal(each) for each in value] if isinstance(value, list) else value


def _new(automations: list[Named], *, besides: list[Named]) -> Named:
    known = {each["id"] for each in besides}
    return {each["name"]: each for each in automations if each["id"] not in known}


def _automation_words(name: str, ours: Named | None, theirs: Named | None) -> str:
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
