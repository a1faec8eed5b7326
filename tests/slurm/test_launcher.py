"""The launcher on a real Slurm: one array per run, whoever submits and whatever dies; refusals say what would fit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from infra.launcher import JobSpec, JobState, JobStatus, Needs
from infra.slurm.batch import sbatch_arguments, script
from infra.slurm.claims import Claim, change_claim, read_claim
from infra.slurm.launcher import SlurmLauncher
from infra.slurm.site import Site
from infra.slurm.tasks import Task, job_name
from tasks.nodes import describe
from tests.slurm.cluster import SlurmCluster
from tests.slurm.running import ROOT, SITE
from tests.waiting import wait_until
from training.errors import FencedError, UserError
from training.runs.job import agent_environment
from training.s3.objectstore import Store

NUM_NODES = 2
NUM_SUBMITTERS = 8
OUTRANKED = "Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions"
TOO_LARGE = """Slurm refused the job: allocation failure: Requested node configuration is not available
what the cluster has:
  partition low (up): 4 nodes, each with 4 CPUs, 4000 MiB and gpu:fake:2, for at most 1:00:00
  partition high (up): 4 nodes, each with 4 CPUs, 4000 MiB and gpu:fake:2, for at most 1:00:00"""


class Launched(SlurmLauncher):
    """Whose job is a process that says that it is there, and waits."""

    def __init__(self, home: Path, store: Store, site: Site, *, num_nodes: int = NUM_NODES) -> None:
        super().__init__(home, store, site)
        self.key = os.urandom(32).hex()
        self.folder = home
        self.num_nodes = num_nodes

    def spec(self, *, owner: str | None = None, generation: int = 0, needs: Needs | None = None) -> JobSpec:
        says = f"import pathlib, time; pathlib.Path('{self.folder}/{{node}}').touch(); time.sleep(600)"
        return JobSpec(
            key=self.key,
            num_nodes=self.num_nodes,
            command=(sys.executable, "-c", says),
            environment=agent_environment(self._store.location),
            store=self._store.location.uri(),
            generation=generation,
            needs=needs or Needs(),
            owner=owner,
        )

    def own_tasks(self) -> list[Task]:
        return self.tasks(self.key)

    def wait_until_running(self) -> JobStatus:
        def look() -> JobStatus | None:
            status = self.find(self.key)
            is_running = status is not None and status.state is JobState.RUNNING
            return status if is_running and len(self.nodes_at_work()) == self.num_nodes else None

        return wait_until(look, what="the job to run")

    def nodes_at_work(self) -> list[Path]:
        return list(self.folder.glob("[0-9]"))

    def wait_until_told(self, words: str) -> None:
        """Who follows it, of its nodes."""
        wait_until(lambda: describe(self.find(self.key)) == words, what=f"the nodes to be {words}")


@pytest.fixture
def launcher(cluster: SlurmCluster, store: Store, tmp_path: Path) -> Iterator[Launched]:
    launched = Launched(tmp_path, store, Site(commands=str(cluster.commands)))
    yield launched
    launched.cancel(launched.key)


def test_a_job_runs_once_and_is_gone_when_it_is_cancelled(launcher: Launched) -> None:
    assert launcher.find(launcher.key) is None
    launcher.submit(launcher.spec(owner="one"))
    status = launcher.wait_until_running()
    assert sorted(status.nodes) == ["node0", "node1"]
    launcher.submit(launcher.spec(owner="two"))
    assert len({task.job_id for task in launcher.own_tasks()}) == 1
    assert launcher.jobs()[launcher.key] == ("one", "two")
    assert [path.name for path in launcher.logs(launcher.key)] == ["node0.log", "node1.log"]

    launcher.cancel(launcher.key)
    assert launcher.find(launcher.key) is None
    assert launcher.own_tasks() == []
    assert launcher.key not in launcher.jobs()


def test_submitters_at_once_make_one_array(launcher: Launched) -> None:
    specs = [launcher.spec(owner=f"owner{number}") for number in range(NUM_SUBMITTERS)]
    with ThreadPoolExecutor(NUM_SUBMITTERS) as pool:
        list(pool.map(launcher.submit, specs))
    launcher.wait_until_running()
    wait_until(lambda: len({task.job_id for task in launcher.own_tasks()}) == 1, what="the other arrays to be gone")
    assert set(launcher.jobs()[launcher.key]) == {spec.owner for spec in specs}


def test_a_submitter_killed_before_its_claim_leaves_nothing_behind(launcher: Launched) -> None:
    stray = launcher._submit_held(launcher.spec())
    assert all(task.is_held for task in launcher.own_tasks())
    launcher.submit(launcher.spec())
    launcher.wait_until_running()
    wait_until(lambda: stray not in {task.job_id for task in launcher.own_tasks()}, what="the stray to be gone")


def test_a_submitter_killed_after_its_claim_is_gone_on_for(launcher: Launched) -> None:
    held = launcher._submit_held(launcher.spec())
    change_claim(launcher._store, launcher.key, lambda _: Claim(job_id=held, owners=("dead",)))
    launcher.submit(launcher.spec(owner="next"))
    launcher.wait_until_running()
    assert {task.job_id for task in launcher.own_tasks()} == {held}
    assert launcher.jobs()[launcher.key] == ("dead", "next")


def test_an_array_that_is_not_the_runs_ends_with_success(launcher: Launched, cluster: SlurmCluster) -> None:
    """Somebody submitted the same script by hand."""
    launcher.submit(launcher.spec())
    launcher.wait_until_running()
    name = job_name(launcher._mark, launcher.key)
    spec, folder = launcher.spec(), launcher._log_folder(launcher.key)
    arguments = sbatch_arguments(spec, launcher._site, name=name, log_folder=folder)
    arguments = [*(argument for argument in arguments if "--output" not in argument), f"--output={folder}/x%a"]
    done = subprocess.run(
        [cluster.commands / "sbatch", *arguments],
        input=script(spec),
        env={**os.environ, **spec.environment},
        text=True,
        capture_output=True,
        check=True,
    )
    second = done.stdout.strip()
    wait_until(lambda: second not in {task.job_id for task in launcher.own_tasks()}, what="the second gang to end")
    assert "has nothing to do" in (folder / "x0").read_text()
    assert "ExitCode=0:0" in cluster.run("scontrol", "show", "job", second)


def test_a_newer_generation_takes_the_place_of_an_older_one(launcher: Launched) -> None:
    launcher.submit(launcher.spec())
    launcher.wait_until_running()
    (before,) = {task.job_id for task in launcher.own_tasks()}
    launcher.submit(launcher.spec(generation=1))
    wait_until(lambda: before not in {task.job_id for task in launcher.own_tasks()}, what="the older array to be gone")
    assert read_claim(launcher._store, launcher.key).generation == 1
    with pytest.raises(FencedError, match="begun anew"):
        launcher.submit(launcher.spec(generation=0))


def test_a_job_that_was_ended_by_hand_is_ended_and_can_be_submitted_again(
    launcher: Launched, cluster: SlurmCluster
) -> None:
    launcher.submit(launcher.spec(owner="one"))
    launcher.wait_until_running()
    cluster.run("scancel", launcher.own_tasks()[0].job_id)

    def is_ended() -> bool:
        status = launcher.find(launcher.key)
        return status is not None and status.state is JobState.ENDED

    wait_until(is_ended, what="the launcher to see it")
    launcher.submit(launcher.spec(owner="two"))
    launcher.wait_until_running()
    assert launcher.jobs()[launcher.key] == ("one", "two")


def test_without_a_controller_nothing_is_known_and_nothing_is_lost(launcher: Launched, cluster: SlurmCluster) -> None:
    launcher.submit(launcher.spec())
    launcher.wait_until_running()
    before = launcher.own_tasks()
    cluster.wait_until_saved(before[0].job_id)
    cluster.kill_controller()
    status = launcher.find(launcher.key)
    assert status is not None
    assert status.state is JobState.UNKNOWN
    cluster.start_controller()
    wait_until(
        lambda: (
            launcher.find(launcher.key)
            == JobStatus(state=JobState.RUNNING, nodes={f"node{task.node}": task.describe() for task in before})
        ),
        what="the controller to know its jobs again",
    )


@pytest.mark.parametrize(
    ("site", "needs", "said"),
    [
        ({"partition": "gpu"}, Needs(), "partition"),
        ({}, Needs(num_gpus=3), "not available"),
        ({}, Needs(num_cpus=64), "not available"),
        ({}, Needs(memory_bytes=1 << 40), "not available"),
    ],
)
def test_what_will_never_fit_is_refused_with_what_would(
    cluster: SlurmCluster, store: Store, tmp_path: Path, site: dict[str, str], needs: Needs, said: str
) -> None:
    launched = Launched(tmp_path, store, Site(commands=str(cluster.commands), **site))
    with pytest.raises(UserError, match=said) as raised:
        launched.submit(launched.spec(needs=needs))
    assert "partition low (up): 4 nodes, each with 4 CPUs, 4000 MiB and gpu:fake:2, for at most" in str(raised.value)
    assert launched.own_tasks() == []
    assert launched.find(launched.key) is None


def test_a_priority_that_the_site_does_not_have_is_refused(launcher: Launched) -> None:
    with pytest.raises(UserError, match=r"launch.priority = 'high' is not one of this site's"):
        launcher.submit(launcher.spec(needs=Needs(priority="high")))


@pytest.mark.slow
def test_the_more_urgent_one_goes_first_and_one_too_large_does_not_wait(
    cluster: SlurmCluster, store: Store, tmp_path: Path
) -> None:
    """While a run has all nodes, which nobody may take from it, two of different priority wait for all of them."""
    at = Site(commands=str(cluster.commands), priorities=SITE)
    runs = [Launched(tmp_path / name, store, at, num_nodes=4) for name in ("holder", "first", "second", "large")]
    holder, first, second, large = runs
    low, high = (Needs(priority=priority, num_cpus=4) for priority in ("low", "high"))
    with ExitStack() as stack:
        for run in runs:
            run.folder.mkdir()
            stack.callback(run.cancel, run.key)
        holder.submit(holder.spec(needs=high))
        holder.wait_until_running()
        first.submit(first.spec(needs=low))
        first.wait_until_told("4 PENDING (Resources)")
        second.submit(second.spec(needs=high))
        second.wait_until_told("4 PENDING (Resources)")
        first.wait_until_told(f"4 PENDING ({OUTRANKED})")
        with pytest.raises(UserError) as raised:
            large.submit(large.spec(needs=replace(low, num_gpus=3)))
        assert str(raised.value) == TOO_LARGE
        assert large.own_tasks() == []

        holder.cancel(holder.key)
        second.wait_until_running()
        first.wait_until_told("4 PENDING (Resources)")
        assert first.nodes_at_work() == []
        second.cancel(second.key)
        first.wait_until_running()
    page = (ROOT / "docs/slurm.md").read_text()
    assert all(words in page for words in ("4 PENDING (Resources)", OUTRANKED, TOO_LARGE))
