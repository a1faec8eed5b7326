"""Three hosts, one fault after another in one run: each is survived in the way it should be, and the bits are those of
one process that nothing happened to."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tests.conftest import Stack
from tests.faults.agents import Agents, find, submit
from tests.faults.hosts import Cluster, Host
from tests.faults.injectors import KillProcess, Stop
from tests.faults.machine import PowerLoss
from tests.faults.network import Cut, StoreTrouble
from tests.faults.relay import Trouble
from tests.waiting import wait_until
from training.cluster.agent import EXIT_PREEMPTED
from training.runs.events import Event
from training.runs.history import committed_steps, events_of
from training.s3.objectstore import Store

STEPS = 300
PAUSE_SECONDS = 0.25
"""Of each microbatch, two in a step, until all faults were survived: two minutes and a half."""


@pytest.fixture(scope="module")
def cluster(stack: Stack) -> Iterator[Cluster]:
    with Cluster(3, store=stack.location.endpoint) as running:
        yield running


@pytest.fixture(scope="module")
def calm(stack: Stack, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Agents:
    """The same run in one process, finished."""
    store = Store(replace(stack.location, prefix=f"tests/calm-{os.urandom(4).hex()}/"))
    agents = begin(store, cluster, tmp_path_factory.mktemp("calm"), num_nodes=1)
    agents.hurry()
    agents.start(cluster.hosts[0])
    agents.result()
    return agents


def begin(
    store: Store, cluster: Cluster, folder: Path, *, num_nodes: int = 3, lost_after_seconds: float = 2.0
) -> Agents:
    agents = submit(
        store,
        cluster,
        folder,
        num_nodes=num_nodes,
        steps=STEPS,
        is_slow=True,
        silence_seconds=lost_after_seconds,
        hang_seconds=lost_after_seconds,
        join_seconds=60.0,
        balance_seconds=1.0,
    )
    (agents.folder / "slow").write_text(str(PAUSE_SECONDS))
    return agents


def attempts(agents: Agents) -> list[Event]:
    return told(agents, "attempt")


def told(agents: Agents, kind: str) -> list[Event]:
    return [event for event in events_of(agents.run, agents.run.read()) if event.kind == kind]


def wait_for_group(agents: Agents, *, num_ranks: int, after: int) -> Event:
    """The first group of so many ranks after that many attempts; it has begun to train. How many there were, whoever
    strikes counts before: a machine that stalls makes one more."""

    def look() -> Event | None:
        return next((a for a in attempts(agents)[after:] if a.values["world_size"] == num_ranks), None)

    return wait_until(look, what=f"a group of {num_ranks}")


def history(agents: Agents) -> list[tuple[int, float, str]]:
    found = committed_steps(agents.run, agents.run.read())
    return [(event.step, event.values["loss"], event.values["samples"]) for event in found]


def require_same(agents: Agents, calm: Agents) -> None:
    """Bits and history are those of the calm run; no group but the first began with anything but what was in memory."""
    agents.hurry()
    assert agents.result() == replace(calm.result(), checkpoint=agents.result().checkpoint)
    assert history(agents) == history(calm)
    assert [event.values["source"] for event in attempts(agents)] == ["start"] + ["memory"] * (
        len(attempts(agents)) - 1
    )


def start_all(agents: Agents, hosts: Sequence[Host]) -> list[subprocess.Popen[str]]:
    started = [agents.start(host) for host in hosts]
    wait_for_group(agents, num_ranks=len(hosts), after=0)
    wait_until(lambda: told(agents, "step"), what="a step")  # before that there is nothing in memory
    return started


def test_processes_killed_stopped_and_lost_one_after_another(
    store: Store, cluster: Cluster, hosts: Sequence[Host], tmp_path: Path, calm: Agents
) -> None:
    agents = begin(store, cluster, tmp_path)
    start_all(agents, hosts)

    seen, kill = len(attempts(agents)), KillProcess(rank_of(hosts[1]))
    kill.fire()
    assert kill.fired
    wait_for_group(agents, num_ranks=3, after=seen)

    seen, stop = len(attempts(agents)), Stop([rank_of(hosts[2])])
    stop.fire()
    assert stop.fired
    wait_for_group(agents, num_ranks=3, after=seen)
    wait_until(lambda: "Hung" in [left.class_name for left in agents.run.read().departures], what="the hang to be told")

    seen, first = len(attempts(agents)), KillProcess(find(hosts[0], "training.cluster.agent")[0])
    first.fire()
    assert first.fired
    wait_for_group(agents, num_ranks=2, after=seen)
    assert agents.running.pop(0).wait(timeout=120) == -9
    wait_until(lambda: not find(hosts[0], "training.cluster.worker"), what="the ranks to die with their agent")
    seen = len(attempts(agents))
    agents.start(hosts[0])
    wait_for_group(agents, num_ranks=3, after=seen)

    seen = len(attempts(agents))
    with PowerLoss(hosts[1]) as loss:
        wait_for_group(agents, num_ranks=2, after=seen)
    assert loss.fired
    assert agents.running.pop(0).wait(timeout=120) == -9
    seen = len(attempts(agents))
    agents.start(hosts[1])
    wait_for_group(agents, num_ranks=3, after=seen)
    require_same(agents, calm)


def rank_of(host: Host) -> psutil.Process:
    return wait_until(lambda: find(host, "training.cluster.worker"), what=f"a rank on host {host.number}")[0]


def test_links_cut_and_the_store_away(
    store: Store, cluster: Cluster, hosts: Sequence[Host], tmp_path: Path, calm: Agents
) -> None:
    agents = begin(store, cluster, tmp_path)
    start_all(agents, hosts)

    seen = len(attempts(agents))
    with Cut(hosts[2]) as cut:
        wait_for_group(agents, num_ranks=2, after=seen)
        assert cut.fired
    wait_for_group(agents, num_ranks=3, after=seen + 1)

    assert cluster.store is not None
    seen = len(attempts(agents))
    with StoreTrouble(cluster.store, Trouble.ANSWERED_503) as away:
        before = agents.run.read().token
        wait_until(lambda: away.num_struck > 3, what="the store to be missed")
        victim = KillProcess(find(hosts[1], "training.cluster.agent")[0])
        victim.fire()
        assert victim.fired
        wait_until(lambda: agents.is_out_of(before, hosts[0]), what="the group to pause")
        assert agents.run.read().token == before, "nobody goes on without the record"
    wait_for_group(agents, num_ranks=2, after=seen)
    assert agents.running.pop(1).wait(timeout=120) == -9
    agents.start(hosts[1])
    require_same(agents, calm)


def slow_nodes(agents: Agents) -> set[int]:
    return {straggler["node"] for event in told(agents, "pace") if (straggler := event.values["straggler"])}


@pytest.mark.slow
def test_a_slow_node_gets_less_and_is_named_and_a_preempted_one_leaves_a_checkpoint_and_says_so(
    store: Store, cluster: Cluster, hosts: Sequence[Host], tmp_path: Path, calm: Agents
) -> None:
    agents = begin(store, cluster, tmp_path, lost_after_seconds=30.0)  # a new group would be balanced anew
    started = start_all(agents, hosts)
    assert not told(agents, "balance")
    agents.slower(hosts[1]).write_text(str(PAUSE_SECONDS))
    wait_until(lambda: told(agents, "balance"), what="the slow node to get fewer virtual workers")
    assert [event.values["shares"] for event in told(agents, "balance")] == [[2, 1, 2]]
    wait_until(lambda: slow_nodes(agents), what="the slow node to be named")
    assert slow_nodes(agents) == {1}
    agents.slower(hosts[1]).unlink()
    seen = len(attempts(agents))
    for process in hosts[0].processes():  # as engines do that signal a whole group
        with contextlib.suppress(psutil.NoSuchProcess):  # who heard first may have ended another
            process.send_signal(signal.SIGTERM)
    assert started[0].wait(timeout=120) == EXIT_PREEMPTED
    agents.running.remove(started[0])
    resumed = wait_for_group(agents, num_ranks=2, after=seen)
    assert resumed.step in [checkpoint.step for checkpoint in agents.run.read().checkpoints]
    require_same(agents, calm)
