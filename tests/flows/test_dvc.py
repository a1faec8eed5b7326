"""`dvc repro`: the same stages without Prefect; nothing is done twice, and what is locked is always the same."""

from __future__ import annotations

import json
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from infra.local.stack import dvc_remote
from tests.conftest import Stack
from tests.flows.runs import mlflow_runs

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(sysconfig.get_path("scripts"))


@pytest.fixture
def checkout(stack: Stack, tmp_path: Path) -> Path:
    """A copy of the project as git would clone it, with a shorter training, and the stack as its DVC remote."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True)
    for name in listed.stdout.decode().splitlines():
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tmp_path / name)
    preset = tmp_path / "training/presets/digits.toml"
    preset.write_text(preset.read_text().replace("steps = 300", "steps = 60"))
    (tmp_path / ".dvc/config.local").write_text(dvc_remote(stack.settings))
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    return tmp_path


def test_repro_does_what_is_needed_and_no_more(stack: Stack, checkout: Path) -> None:
    first = _dvc(stack, checkout, "repro")
    assert first.count("Running stage") == 4
    lock = (checkout / "dvc.lock").read_bytes()
    model = json.loads((checkout / "data/digits/model.json").read_text())
    assert model["step"] == 60
    assert len((checkout / "data/digits/loss.csv").read_text().splitlines()) == 61
    assert len(mlflow_runs(stack, model["run_key"])) == 1

    assert "Running stage" not in _dvc(stack, checkout, "repro")
    assert (checkout / "dvc.lock").read_bytes() == lock
    assert "accuracy" in _dvc(stack, checkout, "metrics", "show")
    assert "pushed" in _dvc(stack, checkout, "push")

    preset = checkout / "training/presets/digits.toml"
    preset.write_text(preset.read_text().replace("confidence = 0.95", "confidence = 0.9"))
    ran = [line for line in _dvc(stack, checkout, "repro").splitlines() if line.startswith("Running stage")]
    assert ran == ["Running stage 'evaluate':", "Running stage 'register':"]

    preset.write_text(preset.read_text().replace("confidence = 0.9", "confidence = 0.95"))
    shutil.rmtree(checkout / "data")
    shutil.rmtree(checkout / ".dvc/cache")
    (checkout / "dvc.lock").unlink()
    _dvc(stack, checkout, "repro", "--force")
    assert (checkout / "dvc.lock").read_bytes() == lock, "locked bytes hold something that changes"


def _dvc(stack: Stack, checkout: Path, *arguments: str) -> str:
    environment = {**stack.environment(), "PATH": f"{SCRIPTS}:/usr/bin:/bin"}
    environment.pop("PREFECT_API_URL", None)
    done = subprocess.run(
        [SCRIPTS / "dvc", *arguments],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
