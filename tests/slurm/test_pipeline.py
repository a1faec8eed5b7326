"""The chain on Slurm: the same commands, and the same model as on one machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from infra.slurm.launcher import SlurmLauncher
from infra.slurm.site import Site
from tests.conftest import Stack
from tests.flows.runs import PATIENT, last_json, mlflow_runs
from tests.slurm.cluster import SlurmCluster
from tests.waiting import wait_until
from training.runs.record import RunRecord

pytestmark = pytest.mark.slow
NUM_FILES = 6
SHORT = ("--set", "train.steps=40", "--set", "seed=71")


@pytest.fixture
def on_slurm(cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is started from now on finds its engine in the environment."""
    monkeypatch.setenv("UNBROKEN_ENGINE_KIND", "slurm")
    monkeypatch.setenv("UNBROKEN_SLURM_COMMANDS", str(cluster.commands))


def test_four_nodes_give_the_model_of_one_machine(
    stack: Stack, cluster: SlurmCluster, on_slurm: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = ("--set", "launch.nodes=4", "--set", "launch.cpus_per_node=4", "--set", "launch.gpus_per_node=2")
    done = stack.command("train", "digits", "--json", *SHORT, *PATIENT, *needs)
    assert done.returncode == 0, done.stdout + done.stderr
    there = last_json(done.stdout)
    key = there["run_key"]
    record = RunRecord(stack.store, key).read()
    assert len({member.address for member in record.members}) == 4, "each node was a host of its own"
    (tracked,) = mlflow_runs(stack, key)
    assert tracked.info.status == "FINISHED"
    launcher = SlurmLauncher(stack.home, stack.store, Site(commands=str(cluster.commands)))
    wait_until(lambda: not launcher.tasks(key), what="the job to be gone")

    monkeypatch.setenv("UNBROKEN_ENGINE_KIND", "local")
    done = stack.command("train", "digits", "--json", *SHORT, "--fresh", "--ranks", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert last_json(done.stdout)["state_sha256"] == there["state_sha256"]


def test_nodes_shard_and_the_stage_finds_it_done(
    stack: Stack, on_slurm: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scaffold(stack, tmp_path)
    said = shard(stack, tmp_path, name="there", launch="shard_nodes = 3")
    assert f"{NUM_FILES} of {NUM_FILES} partitions found finished, 0 shards sent" in said
    assert list(stack.store.list_keys("datasets/there/sharing/")) == []

    monkeypatch.setenv("UNBROKEN_ENGINE_KIND", "local")
    assert f"0 of {NUM_FILES} partitions found finished" in shard(stack, tmp_path, name="here", launch="")
    here, there = (
        {key.rpartition("/")[2] for key, _ in stack.store.list_keys(f"datasets/{name}/manifests/")}
        for name in ("here", "there")
    )
    assert here == there
    assert len(here) == 1


def scaffold(stack: Stack, folder: Path) -> None:
    """A recipe from outside this repository, with its records in several files, a partition each."""
    assert stack.command("init", "spirals", cwd=folder).returncode == 0
    lines = (folder / "spirals/records.jsonl").read_text().splitlines(keepends=True)
    (folder / "spirals/raw").mkdir()
    for number in range(NUM_FILES):
        (folder / f"spirals/raw/{number}.jsonl").write_text("".join(lines[number::NUM_FILES]))


def shard(stack: Stack, folder: Path, *, name: str, launch: str) -> str:
    """What the stage says, of a dataset of that name."""
    text = (folder / "spirals/spirals.toml").read_text()
    text = text.replace('source = "records.jsonl"', 'source = "raw"\npartition_bytes = 1024')
    text = text.replace('[data]\nname = "spirals"', f'[data]\nname = "{name}"')
    (folder / f"spirals/{name}.toml").write_text(text.replace("[launch]", f"[launch]\n{launch}"))
    command = [sys.executable, "-m", "tasks", "shard", "--preset", f"spirals/{name}.toml"]
    done = stack.execute(command, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_what_never_fits_is_said_before_anything_waits(stack: Stack, on_slurm: None) -> None:
    # what a run is needs no engine: a finished one ends with 0
    never_run = ("--set", "train.steps=40", "--set", "seed=72")
    done = stack.command("train", "digits", *never_run, "--set", "launch.gpus_per_node=3")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Slurm refused the job" in done.stderr
    assert "partition low (up): 4 nodes, each with 4 CPUs, 4000 MiB and gpu:fake:2" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_doctor_knows_what_the_site_should_change(stack: Stack, on_slurm: None) -> None:
    done = stack.command("doctor", "slurm", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = {check["name"]: check for check in json.loads(done.stdout)}
    assert found["SlurmdTimeout"]["found"].startswith("60 sec")
    assert "a job is taken" in found["placement (no priority)"]["found"]
    assert {"Slurm", "AuthInfo", "ReturnToService", "partition low"} <= found.keys()


def test_the_doctor_says_that_there_is_no_slurm(stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNBROKEN_SLURM_COMMANDS", str(tmp_path))
    done = stack.command("doctor", "slurm")
    assert done.returncode == 3
    assert f"there is no command {tmp_path}/scontrol" in done.stdout
