"""`python -m tasks`: what is wrong with a stage's folder is one line that names it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.conftest import Stack


def refused(stack: Stack, *arguments: str) -> str:
    done = stack.execute([sys.executable, "-m", "tasks", *arguments, "--preset", "digits"])
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    return line


def test_an_output_folder_that_cannot_be_made_is_named(stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    line = refused(stack, "shard", "--out", str(tmp_path / "file"))
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
def test_what_no_stage_left_is_named(stack: Stack, tmp_path: Path, left: str | None, says: str) -> None:
    (tmp_path / "digits").mkdir()
    if left is not None:
        (tmp_path / "digits/dataset.json").write_text(left)
    assert says in refused(stack, "evaluate", "--out", str(tmp_path))
