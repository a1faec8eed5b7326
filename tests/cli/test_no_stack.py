"""Without a running stack every verb that needs one says so, with the command that starts it: exit code 3."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.cli.commands import complaint
from tests.conftest import UNBROKEN
from tests.infra.probes import environment_for

VERBS = [
    ("status",),
    ("status", "abc"),
    ("run", "digits"),
    ("train", "digits"),
    ("runs", "ls"),
    ("data", "ls"),
    ("models", "ls"),
]


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_stack_that_was_never_up(tmp_path: Path, verb: tuple[str, ...]) -> None:
    line = complaint(_unbroken(tmp_path, *verb), code=3)
    assert "the local stack is not running: start it with `unbroken up`" in line


def test_down_of_nothing_is_fine(tmp_path: Path) -> None:
    done = _unbroken(tmp_path, "down")
    assert (done.returncode, done.stdout) == (0, "nothing was running\n")


def _unbroken(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = environment_for(folder / "home")
    command = [UNBROKEN, *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
