"""A node that dies at once is started again at once, then more slowly, and not for ever."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infra.local.node import EXIT_CANCELLED, EXIT_NO_COMMAND, job_path, starts_path
from infra.restarts import (
    EXIT_GIVEN_UP,
    MAX_PAUSE_SECONDS,
    NUM_FREE_STARTS,
    NUM_STARTS_BEFORE_GIVING_UP,
    QUICK_SECONDS,
    pause_seconds,
    quick_series,
)
from tests.waiting import wait_until

KEY = "ab" * 32


def test_only_the_last_quick_series_counts() -> None:
    old, quick = [0.0, 1.0, 2.0], [100.0, 105.0, 110.0]
    assert quick_series([*old, *quick], 111.0) == quick
    assert quick_series(quick, 110.0 + QUICK_SECONDS) == [], "the last life was long"
    assert quick_series([], 5.0) == []
    assert quick_series([200.0], 100.0) == [], "a clock that was set back is no reason to wait"


def test_first_starts_are_free_and_pauses_are_bounded() -> None:
    pauses = [pause_seconds(n) for n in range(NUM_STARTS_BEFORE_GIVING_UP)]
    assert pauses[:NUM_FREE_STARTS] == [0.0] * NUM_FREE_STARTS
    assert pauses == sorted(pauses)
    assert pauses[-1] == MAX_PAUSE_SECONDS < QUICK_SECONDS, "or a pause would end the series that asked for it"


def _run_node(home: Path, command: list[str], *, starts: int = 0) -> subprocess.CompletedProcess[str]:
    job_path(home, KEY).parent.mkdir(exist_ok=True)
    job_path(home, KEY).write_text(json.dumps({"command": command, "environment": {"TOLD": 'it\'s "x" # y'}}))
    starts_path(home, KEY, "3").write_text(f"{time.time()}\n" * starts)
    return _run(home)


def _run(home: Path) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "infra.local.node", str(home), KEY, "3"]
    return subprocess.run(program, capture_output=True, text=True, timeout=240, check=False)


def test_node_becomes_its_command(tmp_path: Path) -> None:
    code = "import os, sys; print(sys.argv[1], os.environ['TOLD']); sys.exit(7)"
    done = _run_node(tmp_path, [sys.executable, "-c", code, "n{node}"])
    assert (done.returncode, done.stdout) == (7, 'n3 it\'s "x" # y\n')


def test_node_that_keeps_dying_is_given_up_with_a_word(tmp_path: Path) -> None:
    def run() -> subprocess.CompletedProcess[str] | None:
        """On a slow machine it may come too late for the series to be a quick one."""
        done = _run_node(tmp_path, ["/bin/true"], starts=NUM_STARTS_BEFORE_GIVING_UP)
        return done if done.returncode == EXIT_GIVEN_UP else None

    done = wait_until(run, what="a node to be given up")
    assert "node 3 died 60 times in a row soon after its start: given up" in done.stdout


@pytest.mark.parametrize("command", ["/nowhere/command", "/etc/hostname"])
def test_command_that_cannot_be_run_is_named(tmp_path: Path, command: str) -> None:
    done = _run_node(tmp_path, [command])
    assert done.returncode == EXIT_NO_COMMAND
    assert f"cannot run {command}" in done.stdout


def test_node_of_a_cancelled_job_ends_quietly(tmp_path: Path) -> None:
    assert _run(tmp_path).returncode == EXIT_CANCELLED
    assert os.listdir(tmp_path) == []
