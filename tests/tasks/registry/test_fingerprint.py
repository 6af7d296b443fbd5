"""What counts as the same code."""

from pathlib import Path

import pytest

from tasks.registry.fingerprint import digest_code


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a project with a file in two rooms, in place of ours."""
    for room in ("expectations", "tasks"):
        (tmp_path / room).mkdir()
        (tmp_path / room / "rule.py").write_text("limit = 1")
    monkeypatch.setattr(
        "tasks.registry.fingerprint.__file__",
        str(tmp_path / "tasks" / "registry" / "fingerprint.py"),
    )
    return tmp_path


@pytest.mark.parametrize(("room", "changed"), [("expectations", True), ("tasks", False)])
def test_an_edit_outside_a_room_leaves_the_digest_of_the_room(
    project: Path, room: str, *, changed: bool
) -> None:
    digest = digest_code.__wrapped__  # without the cache, which lives as long as a process
    before, before_all = digest("expectations"), digest()
    (project / room / "rule.py").write_text("limit = 2")
    assert (digest("expectations") != before) is changed
    assert digest() != before_all
