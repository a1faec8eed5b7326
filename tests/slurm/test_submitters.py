"""Many flows of one run, on two hosts: one gang trains, whichever of them dies, and while Slurm's controller does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from infra.launcher import JobState, JobStatus
from infra.slurm.claims import read_claim
from infra.slurm.launcher import SlurmLauncher
from infra.slurm.site import Site
from infra.slurm.tasks import job_name, store_mark
from tasks.opening import identify
from tasks.shard import shard
from tests import patient_recipe
from tests.conftest import Stack
from tests.slurm.cluster import SlurmCluster
from tests.slurm.running import NUM_NODES, ROOT
from tests.waiting import wait_until
from training.config import Preset
from training.errors import InfrastructureError
from training.preset_file import load_preset
from training.runs.history import events_of
from training.runs.record import RunRecord

STEPS = 200
"""They outlast all that is done, at leisure."""
FLOWS = {"n1": ("a", "b", "c", "d"), "n2": ("e", "f", "g", "h", "again")}
"""By their hosts. `again` is the one that is started later."""
AT_ONCE = sorted({*FLOWS["n1"], *FLOWS["n2"]} - {"again"})
ALREADY = "it is being trained already"
PATIENT_SECONDS = 200
STEADY = {"min_nodes": NUM_NODES, "silence_seconds": 30.0, "hang_seconds": 120.0, "collective_timeout_seconds": 120}
"""However slow this machine is just now, it is one group from beginning to end."""


@pytest.mark.slow
@pytest.mark.timeout(3 * PATIENT_SECONDS)
def test_one_gang_trains_whoever_submits_and_dies(
    stack: Stack, cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNBROKEN_ENGINE_KIND", "slurm")
    preset = a_preset(tmp_path)
    dataset = shard.fn(preset)
    run = RunRecord(stack.store, identify(preset, dataset).run_key)
    (tmp_path / "preset.json").write_text(json.dumps(preset.to_json()))
    (tmp_path / "dataset.json").write_text(json.dumps(asdict(dataset)))
    launcher = SlurmLauncher(stack.home, stack.store, Site(commands=str(cluster.commands)))
    with running_flows(stack, cluster, tmp_path) as hosts:
        for name in AT_ONCE:
            start(tmp_path, name, owner=name)
        wait_until(
            lambda: owners(launcher, run) == set(AT_ONCE),
            what="all to have submitted it",
            timeout_seconds=PATIENT_SECONDS,
        )
        wait_for_steps(run, 2)
        claim = read_claim(stack.store, run.run_key)

        first = claim.owners[0]
        (host,) = (host for host, names in FLOWS.items() if first in names)
        cluster.host(host).output(["sh", "-c", f"kill -KILL {(tmp_path / f'{first}.pid').read_text()}"])
        start(tmp_path, "again", owner=first)
        log = tmp_path / "again.log"
        wait_until(lambda: log.exists() and ALREADY in log.read_text(), what="the flow to be there again")
        wait_for_steps(run, 2)

        require_state_while_the_controller_is_away(stack, cluster, launcher, run, log)
        (tmp_path / "slow").unlink()
        codes = exit_codes(hosts)

    assert codes == {**dict.fromkeys((*AT_ONCE, "again"), 0), first: -9}
    models = {(tmp_path / f"{name}.json").read_text() for name in codes if name != first}
    assert len(models) == 1
    record = run.read()
    assert record.result is not None
    assert json.loads(models.pop())["state_sha256"] == record.result.state_sha256
    assert state_shown(stack, run) == "finished"
    assert record.resume_steps == (0,), "one group from beginning to end"
    assert [event.step for event in events_of(run, record) if event.kind == "step"] == list(range(1, 1 + STEPS))
    assert arrays_that_ran(cluster, job_name(store_mark(stack.location), run.run_key)) == {claim.job_id}
    assert launcher.tasks(run.run_key) == []


def a_preset(folder: Path) -> Preset:
    shutil.copy(patient_recipe.__file__, folder)
    (folder / "slow").touch()
    preset = load_preset("digits")
    return replace(
        preset,
        recipe="patient_recipe:Patient",
        folder=str(folder),
        hyperparameters={**preset.hyperparameters, "slow_while": str(folder / "slow")},
        train=replace(preset.train, steps=STEPS),
        launch=replace(preset.launch, nodes=NUM_NODES, cpus_per_node=4, **STEADY),
    )


@contextmanager
def running_flows(stack: Stack, cluster: SlurmCluster, folder: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """On each host one that all its flows are forked from: they are there, and begin when they are told."""
    assert stack.settings.maybe_mlflow_uri is not None
    hosts = []
    for name, flows in FLOWS.items():
        cluster.reach(cluster.host(name), stack.settings.maybe_mlflow_uri)
        command = [sys.executable, "-m", "tests.slurm.flows_of_a_host", str(folder), *flows]
        hosts.append(cluster.host(name).start(command, env=stack.environment(), cwd=str(ROOT), stdout=subprocess.PIPE))
    names = [name for flows in FLOWS.values() for name in flows]
    wait_until(
        lambda: all((folder / f"{name}.pid").exists() for name in names),
        what="the flows to be there",
        timeout_seconds=PATIENT_SECONDS,
    )
    try:
        yield hosts
    finally:
        for process in hosts:
            process.kill()
            process.wait(timeout=120)


def start(folder: Path, name: str, *, owner: str) -> None:
    (folder / "new").write_text(owner)
    os.replace(folder / "new", folder / f"{name}.start")


def exit_codes(hosts: list[subprocess.Popen[str]]) -> dict[str, int]:
    found: dict[str, int] = {}
    for process in hosts:
        said, _ = process.communicate(timeout=PATIENT_SECONDS)
        found |= json.loads(said)
    return found


def wait_for_steps(run: RunRecord, number: int) -> None:
    """More of them than there were."""

    def last() -> int:
        return max((event.step for event in events_of(run, run.read()) if event.kind == "step"), default=0)

    goal = last() + number
    wait_until(lambda: last() >= goal, what=f"step {goal}", timeout_seconds=PATIENT_SECONDS)


def require_state_while_the_controller_is_away(
    stack: Stack, cluster: SlurmCluster, launcher: SlurmLauncher, run: RunRecord, log: Path
) -> None:
    """Killed, and started again: what the launcher, `unbroken runs` and the log of a flow say of the run, which trains
    on."""
    before = wait_until(lambda: status_that_runs(launcher, run), what="its nodes to run")
    cluster.wait_until_saved(read_claim(stack.store, run.run_key).job_id)
    cluster.kill_controller()
    status = launcher.find(run.run_key)
    assert status is not None
    assert status.state is JobState.UNKNOWN
    with pytest.raises(InfrastructureError, match="controller does not answer"):
        launcher.jobs()
    wait_for_steps(run, 2)
    assert state_shown(stack, run) == "open"
    wait_until(lambda: "nodes: unknown" in log.read_text(), what="the flow to say so too")
    cluster.start_controller()
    wait_until(lambda: launcher.find(run.run_key) == before, what="the controller to know its jobs again")
    wait_for_steps(run, 2)
    assert state_shown(stack, run) == "open"


def status_that_runs(launcher: SlurmLauncher, run: RunRecord) -> JobStatus | None:
    status = launcher.find(run.run_key)
    return status if status is not None and status.state is JobState.RUNNING else None


def owners(launcher: SlurmLauncher, run: RunRecord) -> set[str]:
    with suppress(InfrastructureError):  # so many ask at once that the controller may keep one waiting for too long
        return set(launcher.jobs().get(run.run_key, ()))
    return set()


def state_shown(stack: Stack, run: RunRecord) -> Any:
    """By `unbroken runs show`."""
    done = stack.command("runs", "show", run.run_key, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["state"]


def arrays_that_ran(cluster: SlurmCluster, name: str) -> set[str]:
    """Of all of that name that Slurm still knows, those that were anywhere for any time."""
    jobs = [
        dict(word.split("=", 1) for word in line.split() if "=" in word)
        for line in cluster.run("scontrol", "--oneliner", "show", "job").splitlines()
    ]
    return {job["ArrayJobId"] for job in jobs if job["JobName"] == name and job["RunTime"] != "00:00:00"}
