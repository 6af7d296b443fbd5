"""Only what is typed behind `make` counts, and it reaches the command as it was typed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deployments.services import PROJECT

ODD = 'it\'s "odd": $5, $(shell touch MADE), `touch MADE` \\ and; a # comment'

NAMES = "ARGS BATCH CRON DATASET FILES MODEL PARAMS REASON REMOVE TESTS TO URL VERSION ZONE"
OTHERS = dict.fromkeys(NAMES.split(), "9")
"""Variables of other programs, by the names of ours."""


@pytest.fixture
def bin_folder(tmp_path: Path) -> Path:
    """Return a folder whose programs write their arguments and the address to a file, as JSON."""
    told = (
        f"#!{sys.executable}\n"
        "import json, os, sys\n"
        "if sys.argv[1:2] == ['-c']:\n"
        "    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])\n"
        f"with open({str(tmp_path / 'told')!r}, 'w') as file:\n"
        "    json.dump([*sys.argv[1:], os.environ.get('URL') or os.environ['NOTIFY_URL']], file)\n"
    )
    for name in ("python", "prefect"):
        (tmp_path / name).write_text(told)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def make(
    bin_folder: Path, *typed: str, **inherited: str
) -> tuple[list[str], subprocess.CompletedProcess[str]]:
    """Return what the command of a target was given, last the address of URL or NOTIFY_URL."""
    # `make test` hands on what was typed behind it.
    variables = {name: value for name, value in os.environ.items() if "MAKE" not in name}
    done = subprocess.run(
        ["make", "--silent", "-o.venv/installed", f"BIN={bin_folder}", *typed],
        cwd=PROJECT,
        env=variables | {"USER": "anna", "URL": "", "NOTIFY_URL": ""} | inherited,
        capture_output=True,
        text=True,
        check=False,
    )
    told = bin_folder / "told"
    words = json.loads(told.read_text()) if told.exists() else []
    told.unlink(missing_ok=True)
    return words, done


def given(bin_folder: Path, *typed: str, **inherited: str) -> list[str]:
    words, done = make(bin_folder, *typed, **inherited)
    assert done.returncode == 0, done.stderr
    return words


@pytest.mark.parametrize("colour", ["\\033[0m", "1", "yes"])
def test_a_variable_of_the_shell_does_not_reset_what_people_edited(
    bin_folder: Path, colour: str
) -> None:
    plain = ["-m", "deployments.stack", "up", ""]
    assert given(bin_folder, "up", RESET=colour) == plain
    assert given(bin_folder, "-e", "up", RESET=colour) == plain
    assert given(bin_folder, "schedule", "DATASET=a", REMOVE=colour)[-2] != "--remove"


@pytest.mark.parametrize(
    ("word", "reset"),
    [("1", True), ("yes", True), ("true", True), ("0", False), ("no", False), ("", False)],
)
def test_a_reset_and_a_removal_are_typed_with_a_word_for_yes(
    bin_folder: Path, word: str, *, reset: bool
) -> None:
    assert ("--reset" in given(bin_folder, "up", f"RESET={word}", RESET="1")) is reset
    assert ("--remove" in given(bin_folder, "schedule", "DATASET=a", f"REMOVE={word}")) is reset


def test_another_word_is_refused_and_nothing_happens(bin_folder: Path) -> None:
    words, done = make(bin_folder, "up", "RESET=maybe")
    assert words == []
    assert "RESET is 'maybe'; expected 1 or 0" in done.stderr


def test_what_the_shell_holds_for_other_purposes_chooses_nothing(bin_folder: Path) -> None:
    assert given(bin_folder, "notify", **OTHERS) == ["-m", "deployments.notify", ""]
    assert given(bin_folder, "run", **OTHERS) == ["-m", "deployments.demo", ""]
    assert given(bin_folder, "faults", **OTHERS) == ["-m", "tests.faults.table", ""]
    schedule = given(bin_folder, "schedule", **OTHERS)
    assert schedule[2:] == ["--dataset=", "--cron=", "--zone=", ""]
    drop = given(bin_folder, "drop", **OTHERS)
    assert drop[2:] == ["--batch=", "--dataset=mnist", ""]
    approve = given(bin_folder, "approve", **OTHERS, WHO="eve")
    assert json.loads(approve[approve.index("--params") + 1]) == {
        "model": "mnist-cnn",
        "reason": "",
        "who": "anna",
    }
    assert "version=" in approve
    assert "to=null" in given(bin_folder, "rollback", **OTHERS)


def test_a_text_reaches_prefect_as_it_was_typed(bin_folder: Path) -> None:
    typed = ["VERSION=5", f"REASON={ODD}", f"WHO={ODD}", "MODEL=digits-cnn"]
    words = given(bin_folder, "approve", *typed)
    assert words[:4] == ["deployment", "run", "--watch", "promote/manual"]
    assert json.loads(words[words.index("--params") + 1]) == {
        "model": "digits-cnn",
        "reason": ODD,
        "who": ODD,
    }
    assert words[-5:-1] == ["--param", "judgement=approve", "--param", "version=5"]
    assert "to=3" in given(bin_folder, "rollback", "TO=3")
    assert not (PROJECT / "MADE").exists()


@pytest.mark.parametrize(
    ("target", "name", "option"),
    [
        ("drop", "BATCH", "--batch"),
        ("drop", "DATASET", "--dataset"),
        ("schedule", "DATASET", "--dataset"),
        ("schedule", "CRON", "--cron"),
        ("schedule", "ZONE", "--zone"),
    ],
)
def test_a_value_reaches_the_command_as_it_was_typed(
    bin_folder: Path, target: str, name: str, option: str
) -> None:
    for text in (ODD, "-x"):
        assert f"{option}={text}" in given(bin_folder, target, f"{name}={text}")
    assert not (PROJECT / "MADE").exists()


def test_an_address_with_a_dollar_goes_by_the_environment_alone(bin_folder: Path) -> None:
    words = given(bin_folder, "notify", "URL=https://host/$a?b=$(c)&d='e'", URL="https://other")
    assert words == ["-m", "deployments.notify", "https://host/$a?b=$(c)&d='e'"]


def test_an_address_of_the_environment_reaches_the_command_as_it_is(bin_folder: Path) -> None:
    address = "https://host/$a?b=$(c)&d='e'"
    assert given(bin_folder, "notify", NOTIFY_URL=address)[-1] == address
    assert given(bin_folder, "notify", "URL=-", NOTIFY_URL=address)[-1] == "-"


@pytest.mark.parametrize("target", ["approve", "reject", "rollback"])
def test_somebody_judges_where_no_user_is_set(bin_folder: Path, target: str) -> None:
    words = given(bin_folder, target, USER="")
    somebody = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True)
    assert json.loads(words[words.index("--params") + 1])["who"] == somebody.stdout.strip()


def test_words_are_the_shells(bin_folder: Path) -> None:
    words = given(
        bin_folder, "drop", "BATCH=b", "FILES='a file.parquet' $HOME.parquet", HOME="home"
    )
    assert words[-3:-1] == ["a file.parquet", "home.parquet"]
    params = """PARAMS=--param dataset=digits --param training='{"preset": "quick"}'"""
    assert given(bin_folder, "run", params)[2:-1] == [
        "--param",
        "dataset=digits",
        "--param",
        'training={"preset": "quick"}',
    ]
