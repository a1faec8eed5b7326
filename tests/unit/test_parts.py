"""Work shared among processes: what a person sees who stops it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.waiting import wait_until

PART = """
import pathlib, sys, time
pathlib.Path(sys.argv[1]).write_text("up")
time.sleep(600)
"""
WHOLE = """
import pathlib, sys
from tasks.parts import run_parts
run_parts("waits", [pathlib.Path(sys.argv[1])], what="wait")
"""


def test_ctrl_c_stops_the_parts_without_a_word_of_theirs(tmp_path: Path) -> None:
    (tmp_path / "waits.py").write_text(PART)
    told = tmp_path / "0.json"
    whole = subprocess.Popen(
        [sys.executable, "-c", WHOLE, str(told)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_until(lambda: told.exists() and told.read_text() == "up", what="the part to be at work")
    os.killpg(whole.pid, signal.SIGINT)  # as a terminal does
    said = whole.communicate(timeout=240)[1]  # once no part holds the pipe any more
    assert "waits.py" not in said
    assert "KeyboardInterrupt" in said, "of the process that shares the work out"
