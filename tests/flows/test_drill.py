"""`unbroken drill`: real faults in real runs, of which only the report stays; and it goes red for planted bugs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.local.launcher import LocalLauncher
from tasks import mlflow_client, registry
from tasks.drill import matrix
from tasks.drill.faults import NAMES
from tasks.drill.rows import Report
from tasks.drill.scene import note
from tasks.opening import identify
from tasks.shard import shard as shard_stage
from tests.conftest import Stack
from tests.faults.evidence import write_evidence
from tests.flows.planted_training import BUGS, Bug, changed_source, plant
from tests.flows.runs import last_json, run_keys
from training.errors import InfrastructureError
from training.preset_file import load_preset
from training.runs.job import Job, store_job

STEPS = 150


@pytest.fixture
def nothing_stays(stack: Stack) -> Iterator[None]:
    """No run of the user's, no job, and no object of the drill."""
    before = run_keys(stack), set(LocalLauncher(stack.home).jobs())
    yield
    assert (run_keys(stack), set(LocalLauncher(stack.home).jobs())) == before
    assert list(stack.store.list_keys("drills/")) == []
    assert not (stack.home / "drill.json").exists()


def registered_version(stack: Stack) -> str:
    """A model version, as far as a drill looks at one: the job of the run that it came from is on the store."""
    preset = load_preset("digits")
    dataset = shard_stage.fn(preset)
    key = identify(preset, dataset).run_key
    store_job(
        stack.store, Job(key=key, generation=0, preset=preset, dataset_digest=dataset.digest, location=stack.location)
    )
    client, name = mlflow_client.connect(stack.settings.mlflow_uri), f"drilled-{os.urandom(4).hex()}"
    run = client.create_run(client.create_experiment(name))
    client.create_registered_model(name)
    tags = {mlflow_client.RUN_KEY_TAG: key, mlflow_client.WEIGHTS_TAG: "0" * 64}
    version = client.create_model_version(name, source=run.info.artifact_uri, run_id=run.info.run_id, tags=tags)
    return f"{name}/{version.version}"


def leave_behind(stack: Stack) -> None:
    """What a drill leaves that was killed."""
    note(stack.settings, "killed", "0" * 64)
    stack.store.put("drills/killed/runs/x", b"")


def test_a_drill_is_green_leaves_nothing_and_can_be_attached(stack: Stack, tmp_path: Path) -> None:
    version = registered_version(stack)
    leave_behind(stack)
    before = run_keys(stack), set(LocalLauncher(stack.home).jobs())
    faults = "worker-killed"
    done = stack.command(
        *("drill", "digits", "--faults", faults, "--steps", str(STEPS)),
        *("--to", str(tmp_path), "--attach", version, "--json"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = last_json(done.stdout)
    assert report["verdict"] == "green"
    assert [row["fault"] for row in report["rows"]] == faults.split(",")
    for row in report["rows"]:
        assert row["evidence"].endswith("dead")
        assert row["bits_equal"]
        assert row["samples_duplicated"] == 0
        assert 0 < row["detect_seconds"] <= row["next_step_seconds"]
        assert row["num_groups"] >= 2
    assert report["rows"][0]["steps_redone"] == 0
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert "kill -9 of a rank" in (tmp_path / "report.html").read_text()

    assert (run_keys(stack), set(LocalLauncher(stack.home).jobs())) == before
    assert list(stack.store.list_keys("drills/")) == [], "nor of the drill that was killed"
    assert not (stack.home / "drill.json").exists()

    client = mlflow_client.connect(stack.settings.mlflow_uri)
    found = client.get_model_version(*version.split("/"))
    assert found.tags[registry.DRILL_TAG] == "green"
    assert found.tags[f"{registry.DRILL_TAG}.subject"] == report["subject"]
    assert found.tags[f"{registry.DRILL_TAG}.code"] == report["code"]
    assert found.tags[f"{registry.DRILL_TAG}.faults"] == faults
    files = client.list_artifacts(str(found.run_id), f"drill/{report['id']}")
    assert [Path(file.path).name for file in files] == ["report.html", "report.json"]


def test_a_drill_of_another_configuration_is_not_attached(stack: Stack) -> None:
    version = registered_version(stack)
    done = stack.command("drill", "digits", "--set", "train.batch_size=32", "--attach", version)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "came from another recipe, source or configuration" in done.stderr


def drill(stack: Stack, *faults: str, environment: dict[str, str] | None = None) -> Report:
    preset = load_preset("digits")
    dataset = shard_stage.fn(preset)
    return matrix.run(
        stack.settings,
        stack.store,
        matrix.plan(preset, faults=faults),
        dataset_digest=dataset.digest,
        environment=environment,
    )


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_the_whole_matrix_is_green(stack: Stack, nothing_stays: None) -> None:
    report = drill(stack)
    assert [row.fault for row in report.rows] == list(NAMES)
    assert report.is_green, report.to_json()


def test_planted_bugs_still_apply() -> None:
    assert all(compile(changed_source(bug), bug.module, "exec") for bug in BUGS)


@pytest.fixture(scope="module")
def bugs_seen() -> Iterator[list[dict[str, Any]]]:
    """Written down at the end, if every bug was seen."""
    found: list[dict[str, Any]] = []
    yield found
    if len(found) == len(BUGS):
        write_evidence("planted-bugs", rows=sorted(found, key=lambda row: str(row["bug"])))


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.slug)
def test_it_goes_red_for_a_planted_bug(
    stack: Stack, nothing_stays: None, tmp_path: Path, bug: Bug, bugs_seen: list[dict[str, Any]]
) -> None:
    """Only the fault that can show it strikes. A single one: `pytest -m soak tests/flows/test_drill.py -k SLUG`."""
    said = what_is_said_of(stack, bug, tmp_path)
    assert said, f"{bug.name} was not seen"
    print(f"{bug.name}: {'; '.join(said)}")  # shown by -rP, also if it is run alone, which leaves no evidence
    anywhere = [words.replace(str(stack.home), "HOME") for words in said]
    bugs_seen.append({"bug": bug.name, "fault": bug.fault, "said": anywhere})


def what_is_said_of(stack: Stack, bug: Bug, folder: Path) -> list[str]:
    """What a drill of the library with this bug finds wrong; nothing if it is green."""
    try:
        report = drill(stack, bug.fault, environment=plant(bug, folder))
    except InfrastructureError as error:
        if "the run without a fault" not in str(error):
            raise
        return [str(error)]
    (row,) = report.rows
    not_fired = [f"not fired: {row.otherwise}"] if row.status == "not fired" else []
    return [*report.calm.complaints, *row.complaints, *not_fired]
