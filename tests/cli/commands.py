"""Running the real `unbroken` command with input that is wrong, and seeing that nothing came of it."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from infra.local.launcher import LocalLauncher
from tests.conftest import UNBROKEN, Stack
from tests.flows.runs import run_keys


@dataclass(frozen=True, kw_only=True)
class Launched:
    """Everything that a command could have started."""

    num_flow_runs: int
    jobs: frozenset[str]
    runs: frozenset[str]


def launched(stack: Stack) -> Launched:
    request = urllib.request.Request(f"{stack.settings.prefect_api_url}/flow_runs/count", data=b"{}", method="POST")
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=120) as reply:
        count = int(json.load(reply))
    return Launched(
        num_flow_runs=count,
        jobs=frozenset(LocalLauncher(stack.home).jobs()),
        runs=frozenset(run_keys(stack)),
    )


def unbroken(
    stack: Stack, *arguments: str, cwd: Path | None = None, variables: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """The command, with more variables in its environment."""
    return subprocess.run(
        [UNBROKEN, *arguments],
        cwd=cwd,
        env={**stack.environment(), **(variables or {})},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def complaint(done: subprocess.CompletedProcess[str], *, code: int = 2) -> str:
    """The one line that a refused command prints; fails if it is not just one, or if there is a traceback."""
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == code, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("unbroken: ")
    assert done.stdout == ""
    return line
