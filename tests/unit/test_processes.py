"""Processes that do not outlive the one that they serve."""

from __future__ import annotations

import os
import subprocess
import sys


def run(code: str) -> int:
    program = (
        f"import os, time\nfrom training.processes import die_after, die_with\n{code}\nprint('alive')\ntime.sleep(600)"
    )
    return subprocess.run(
        [sys.executable, "-c", program], timeout=240, check=False, stdout=subprocess.DEVNULL
    ).returncode


def test_a_process_that_serves_a_dead_one_ends_at_once() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert run(f"die_after({gone.pid})") == 1
    assert run(f"die_with({gone.pid})") == 1


def test_a_process_ends_with_the_one_that_it_serves() -> None:
    served = subprocess.Popen(["sleep", "600"])
    code = f"die_after({served.pid})\nprint('on', flush=True)\ntime.sleep(600)"
    program = [sys.executable, "-c", f"import time\nfrom training.processes import die_after\n{code}"]
    server = subprocess.Popen(program, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    assert server.stdout.readline() == "on\n"
    os.kill(served.pid, 9)
    served.wait()
    assert server.wait(timeout=120) == 1
    server.stdout.close()
