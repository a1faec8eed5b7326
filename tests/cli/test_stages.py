"""`python -m tasks`: what is wrong with a stage's folder is one line that names it."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from tasks.__main__ import run_stage
from tasks.results import Dataset, TrainedModel
from tests.conftest import Stack
from training.config import Preset
from training.errors import UserError
from training.preset_file import PRESETS

DATASET = Dataset(name="digits", digest="d" * 64, num_train_samples=1, num_test_samples=1, num_shards=2, num_bytes=2)


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


def left_by_train(folder: Path, *, run_key: str) -> Path:
    """What the stages before leave, as far as the next one reads it."""
    preset = folder / "digits.toml"
    preset.write_text((PRESETS / "digits.toml").read_text())
    left = folder / "digits"
    left.mkdir()
    (left / "dataset.json").write_text(json.dumps(asdict(DATASET)))
    model = TrainedModel(run_key=run_key, step=1, weights_sha256="w", state_sha256="s")
    (left / "model.json").write_text(json.dumps(asdict(model)))
    return preset


@pytest.mark.usefixtures("stack")
@pytest.mark.parametrize("name", ["evaluate", "register"])
def test_a_model_of_another_run_is_refused(tmp_path: Path, name: str) -> None:
    preset = left_by_train(tmp_path, run_key="0" * 64)
    with pytest.raises(UserError, match=r"model.json is of run 000000000000, and this preset and dataset are of run"):
        run_stage(name, preset=str(preset), out=tmp_path)


@pytest.mark.usefixtures("stack")
@pytest.mark.parametrize("changed", ["digits.toml", "digits/dataset.json"])
def test_a_stage_that_outlived_its_preset_or_dataset_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    """Its `dvc repro` was killed, and the next one has begun."""
    preset = left_by_train(tmp_path, run_key="0" * 64)
    before = (tmp_path / "digits/model.json").read_bytes()

    def train(config: Preset, dataset: Dataset) -> TrainedModel:
        path = tmp_path / changed
        path.write_text(path.read_text().replace("1", "2"))
        return TrainedModel(run_key="1" * 64, step=2, weights_sha256="w", state_sha256="s")

    monkeypatch.setattr("tasks.train.train", SimpleNamespace(fn=train))
    with pytest.raises(UserError, match=rf"{re.escape(str(tmp_path / changed))} changed while this stage ran"):
        run_stage("train", preset=str(preset), out=tmp_path)
    assert (tmp_path / "digits/model.json").read_bytes() == before
