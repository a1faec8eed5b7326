"""The whole chain, from a deployment, on Slurm: the model of one machine; and nothing left of what nobody wants."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.states import Cancelled

from infra.slurm.launcher import SlurmLauncher
from infra.slurm.site import Site
from tests.conftest import Stack, running_stack
from tests.faults.evidence import write_evidence
from tests.flows.runs import last_json, mlflow_runs, processes, run_keys, wait_for_step
from tests.slurm.cluster import SlurmCluster
from tests.slurm.running import NUM_NODES, medians
from tests.waiting import wait_until

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]
NUM_TIMES = 5
ON_FOUR = ("--set", f"launch.nodes={NUM_NODES}", "--set", "launch.cpus_per_node=4")
LONG = ("--set", "train.steps=100000", "--set", "train.checkpoint_every_steps=20")


@pytest.fixture(scope="module")
def rows() -> Iterator[list[dict[str, Any]]]:
    """Written down at the end, if every soak of this file passed."""
    found: list[dict[str, Any]] = []
    yield found
    if len(found) == 3:
        write_evidence("slurm-chain", rows=sorted(found, key=lambda row: str(row["case"])))


@pytest.fixture(scope="module")
def on_slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stack, SlurmLauncher]]:
    """A stack of its own, whose worker and reaper have Slurm for an engine."""
    folder = tmp_path_factory.mktemp("engine")
    commands = folder / "slurm" / "commands"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNBROKEN_ENGINE_KIND", "slurm")
        patch.setenv("UNBROKEN_SLURM_COMMANDS", str(commands))
        with (
            running_stack(folder / "home") as stack,
            SlurmCluster(folder / "slurm", num_nodes=NUM_NODES, store=stack.settings.s3_endpoint),
        ):
            yield stack, SlurmLauncher(stack.home, stack.store, Site(commands=str(commands)))


def test_the_chain_gives_the_model_of_one_machine(
    on_slurm: tuple[Stack, SlurmLauncher], monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]]
) -> None:
    stack, launcher = on_slurm
    short = ("--json", "--set", "train.steps=60")
    output, _ = stack.start("run", "stdlib", *short, *ON_FOUR).communicate(timeout=1200)
    model = last_json(output)["model"]
    assert launcher.tasks(model["run_key"]) == []
    (tracked,) = mlflow_runs(stack, model["run_key"])
    assert tracked.info.status == "FINISHED"
    monkeypatch.setenv("UNBROKEN_ENGINE_KIND", "local")
    here, _ = stack.start("train", "stdlib", *short, "--fresh", "--ranks", "1").communicate(timeout=1200)
    assert last_json(here)["weights_sha256"] == model["weights_sha256"]
    rows.append({"case": "stdlib on four nodes and on one machine", "weights_sha256": model["weights_sha256"]})


def test_a_cancelled_run_is_gone(on_slurm: tuple[Stack, SlurmLauncher], rows: list[dict[str, Any]]) -> None:
    """By Ctrl-C, which cancels the flow run."""

    def cancel(running: Any, stack: Stack, key: str) -> None:
        running.send_signal(signal.SIGINT)

    times = [{"gone_seconds": ended_seconds(on_slurm, cancel, seed=80 + number)} for number in range(NUM_TIMES)]
    rows.append({"case": "cancelled", **medians(times)})


def test_an_orphaned_job_is_reaped(on_slurm: tuple[Stack, SlurmLauncher], rows: list[dict[str, Any]]) -> None:
    """Its flow's process is dead when its flow run is cancelled."""

    def orphan(running: Any, stack: Stack, key: str) -> None:
        for process in processes(stack, "prefect.engine"):
            process.kill()
        running.kill()
        _, launcher = on_slurm
        (owner,) = launcher.jobs()[key]
        with SyncPrefectClient(stack.settings.prefect_api_url) as client:
            client.set_flow_run_state(owner, Cancelled(), force=True)

    times = [{"gone_seconds": ended_seconds(on_slurm, orphan, seed=90 + number)} for number in range(NUM_TIMES)]
    rows.append({"case": "orphaned", **medians(times)})


def ended_seconds(on_slurm: tuple[Stack, SlurmLauncher], end: Callable[[Any, Stack, str], None], *, seed: int) -> float:
    """From `end`, of a run that trains, until Slurm has no process of it."""
    stack, launcher = on_slurm
    before = run_keys(stack)
    running = stack.start("run", "digits", *LONG, *ON_FOUR, "--set", f"seed={seed}")
    run = wait_for_step(stack, before, step=25)
    began = time.monotonic()
    end(running, stack, run.run_key)
    wait_until(lambda: not launcher.tasks(run.run_key), what="the job to be gone")
    seconds = round(time.monotonic() - began, 2)
    running.communicate(timeout=240)
    return seconds
