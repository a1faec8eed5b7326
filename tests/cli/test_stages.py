"""`python -m tasks`: what is wrong with a stage's folder is one line that names it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tasks.__main__ import run_stage
from tests.conftest import Stack
from training.errors import UserError


def test_an_output_folder_that_cannot_be_made_is_named(stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    command = [sys.executable, "-m", "tasks", "shard", "--out", str(tmp_path / "file"), "--preset", "digits"]
    done = stack.execute(command)
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line == f"error: --out = '{tmp_path}/file': cannot make {tmp_path}/file/digits: Not a directory"


@pytest.mark.parametrize(
    ("left", "says"),
    [
        (None, "dataset.json does not exist: run the stage before this one first"),
        ("{", "dataset.json is not what a stage leaves there"),
        ("[]", "dataset.json is not what a stage leaves there"),
        ('{"name": "digits"}', "dataset.json is not what a stage leaves there"),
    ],
)
@pytest.mark.usefixtures("stack")
def test_what_no_stage_left_is_named(tmp_path: Path, left: str | None, says: str) -> None:
    (tmp_path / "digits").mkdir()
    if left is not None:
        (tmp_path / "digits/dataset.json").write_text(left)
    with pytest.raises(UserError, match=re.escape(says)):
        run_stage("evaluate", preset="digits", out=tmp_path)
