import re
from pathlib import Path

from deployments.stack import PROJECT
from tasks import keys

SPELLED = re.compile(r"""["'](datasets|runs|models|messages|gate-check)/|["']watch/[\w-]+\.json""")


def test_no_other_module_spells_a_key_out() -> None:
    found = [
        f"{path.relative_to(PROJECT)}: {line.strip()}"
        for room in ("flows", "tasks", "deployments")
        for path in sorted((PROJECT / room).rglob("*.py"))
        if path != Path(keys.__file__)
        for line in path.read_text().splitlines()
        if SPELLED.search(line)
    ]
    assert found == []


def test_names_of_producers_stay_in_their_folder() -> None:
    assert keys.judged("digits", 7, "../a b", accepted=True) == (
        "datasets/digits/accepted/000007-%2E%2E/a%20b/"
    )
    assert keys.kept_file("sub/..") == "files/sub/%2E%2E"
