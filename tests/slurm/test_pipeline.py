"""The chain on Slurm: the same commands, and the same model as on one machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from infra.slurm.launcher import SlurmLauncher
from infra.slurm.site import Site
from tests.conftest import Stack
from tests.flows.runs import last_json, mlflow_runs
from tests.slurm.cluster import SlurmCluster
from tests.waiting import wait_until
from training.runs.record import RunRecord

SHORT = ("--set", "train.steps=40", "--set", "seed=71")


@pytest.fixture
def on_slurm(cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is started from now on finds its engine in the environment."""
    monkeypatch.setenv("UNBROKEN_ENGINE_KIND", "slurm")
    monkeypatch.setenv("UNBROKEN_SLURM_COMMANDS", str(cluster.commands))


@pytest.mark.timeout(300)
def test_four_nodes_give_the_model_of_one_machine(
    stack: Stack, cluster: SlurmCluster, on_slurm: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = ("--set", "launch.nodes=4", "--set", "launch.cpus_per_node=4", "--set", "launch.gpus_per_node=2")
    done = stack.command("train", "digits", "--json", *SHORT, *needs)
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


def test_what_never_fits_is_said_before_anything_waits(stack: Stack, on_slurm: None) -> None:
    done = stack.command("train", "digits", *SHORT, "--set", "launch.gpus_per_node=3")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Slurm refused the job" in done.stderr
    assert "partition low (up): 4 nodes, each with 4 CPUs, 4000 MiB and gpu:fake:2" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_doctor_knows_what_the_site_should_change(stack: Stack, on_slurm: None) -> None:
    done = stack.command("doctor", "slurm", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = {check["name"]: check for check in json.loads(done.stdout)}
    assert found["SlurmdTimeout"]["found"].startswith("5 sec")
    assert "a job is taken" in found["placement (no priority)"]["found"]
    assert {"Slurm", "AuthInfo", "ReturnToService", "partition low"} <= found.keys()


def test_the_doctor_says_that_there_is_no_slurm(stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNBROKEN_SLURM_COMMANDS", str(tmp_path))
    done = stack.command("doctor", "slurm")
    assert done.returncode == 3
    assert f"there is no command {tmp_path}/scontrol" in done.stdout
