"""Faults of a watched run of four nodes, each with the alert that is to tell of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.faults.agents import find
from tests.faults.injectors import KillProcess, Lasting, Stop
from tests.faults.machine import FullDisk, PowerLoss
from tests.faults.network import StoreTrouble
from tests.faults.relay import Trouble
from tests.faults.trials import DISK_HOST, NUM_HOSTS, STACK_DISK_HOST, Alarm, Trial, disk_folder
from tests.waiting import wait_until
from training.runs.record import without_failure

MORE_SECONDS = "0.6"
"""What each microbatch takes longer on a host that is slowed down; or takes on all hosts."""
WORKER = "training.cluster.worker"


def killed(trial: Trial, *numbers: int) -> Alarm:
    """They never come back; in the end other machines take their places."""
    losses = [PowerLoss(trial.cluster.hosts[number]) for number in numbers]

    def fire() -> None:
        for loss in losses:
            loss.fire()

    def replace_them() -> None:
        for loss in losses:
            assert loss.fired
            loss.heal()
            trial.agents.restart(loss.host)

    return Alarm(
        fault="a node is killed for good" if len(numbers) == 1 else f"{len(numbers)} nodes are killed at once",
        alert="NodeLost",
        windows=("node_lost", "group_wait"),
        fire=fire,
        heal=replace_them,
        says=[f"node {number} does not answer" for number in numbers],
        num_alerts=len(numbers),
    )


def frozen(trial: Trial, *numbers: int) -> Alarm:
    stop = Stop([rank for number in numbers for rank in find(trial.cluster.hosts[number], WORKER)])
    others = [number for number in range(NUM_HOSTS) if number not in numbers]

    def thaw() -> None:
        assert stop.num_stopped >= len(numbers)
        stop.heal()

    assert all(find(trial.cluster.hosts[number], WORKER) for number in numbers)
    return Alarm(
        fault="all ranks freeze" if not others else "one rank freezes",
        alert="Stalled",
        windows=("stalled", "group_wait"),
        fire=stop.fire,
        heal=thaw,
        says=("has finished no step for", *(f"(node {number})" for number in numbers)),
        follows=("ThroughputFell",),
    )


def slow_node(trial: Trial, number: int = 2) -> Alarm:
    file = trial.agents.slower(trial.cluster.hosts[number])
    return Alarm(
        fault="one node is slow",
        alert="Straggler",
        windows=("straggler", "group_wait"),
        fire=lambda: _write(file, MORE_SECONDS),
        heal=file.unlink,
        says=(f"on node {number} takes", "a slow or busy processor"),
    )


def all_slow(trial: Trial) -> Alarm:
    file = trial.agents.folder / "slow"
    return Alarm(
        fault="every node is slow alike",
        alert="ThroughputFell",
        windows=("throughput", "group_wait"),
        fire=lambda: _write(file, MORE_SECONDS),
        heal=lambda: _write(file, ""),
        says=("samples/s, far fewer than before",),
    )


def no_checkpoints(trial: Trial) -> Alarm:
    """The nodes alone don't reach the store."""
    troubles = [StoreTrouble(trial.cluster.store, Trouble.ANSWERED_503, host) for host in trial.cluster.hosts]
    return _lasting(
        troubles,
        fault="the nodes' checkpoints are refused",
        alert="CheckpointTooOld",
        windows=("checkpoint_old", "group_wait"),
        says=("the newest checkpoint is", "the store refuses writes"),
    )


def server_away(trial: Trial, name: str) -> Alarm:
    return _lasting(
        [StoreTrouble(trial.site.services[name], Trouble.REFUSED)],
        fault=f"{name} is away",
        alert="ServiceAway",
        windows=("service_away", "group_wait"),
        says=(f"{name} does not answer",),
        is_of_run=False,
    )


def node_disk_full(trial: Trial) -> Alarm:
    return _lasting(
        [FullDisk(trial.disks[DISK_HOST])],
        fault="a node's disk is full",
        alert="DiskNearlyFull",
        windows=("group_wait",),
        says=(f"node {DISK_HOST}: the disk under {disk_folder(trial.folder, DISK_HOST)}",),
    )


def stack_disk_full(trial: Trial) -> Alarm:
    """Which is a node's too."""
    return _lasting(
        [FullDisk(trial.disks[STACK_DISK_HOST])],
        fault="the stack's disk is full",
        alert="DiskNearlyFull",
        windows=("group_wait",),
        says=("the disk under the stack's folder has",),
        is_of_run=False,
    )


def monitor_away(trial: Trial) -> Alarm:
    """Its port is closed: nothing of it is seen any more."""
    return Alarm(
        fault="the monitor is away",
        alert="MonitorAway",
        windows=("service_away", "group_wait"),
        fire=trial.site.monitor.close,
        heal=trial.site.monitor.open,
        says=("the monitor does not answer",),
        is_of_run=False,
    )


def node_fails_again_and_again(trial: Trial, number: int = 0) -> Alarm:
    def kill_three_times() -> None:
        for _ in range(3):
            token = trial.agents.run.read().token
            kill = KillProcess(find(trial.cluster.hosts[number], WORKER)[0])
            kill.fire()
            assert kill.fired
            trial.agents.wait_for_group(num_nodes=NUM_HOSTS, after=token)

    return Alarm(
        fault="a node's rank is killed three times",
        alert="RepeatedFailure",
        windows=("group_wait",),
        fire=kill_three_times,
        heal=lambda: None,
        says=("fails again and again", f"last, node {number}"),
    )


def loss_not_finite(trial: Trial, number: int = 2) -> Alarm:
    """The run stops for good; somebody mends the data, and starts it again."""
    file = trial.agents.not_finite(trial.cluster.hosts[number])

    def start_again() -> None:
        wait_until(lambda: trial.agents.run.read().failure, what="the run to stop for good")
        for agent in trial.agents.newest.values():
            assert agent.wait(timeout=200) == 4
        trial.agents.running.clear()
        file.unlink()
        trial.agents.run.update(without_failure)
        for host in range(NUM_HOSTS):
            trial.start(host)

    return Alarm(
        fault="a loss is NaN",
        alert="LossNotFinite",
        windows=("group_wait",),
        fire=file.touch,
        heal=start_again,
        says=("the loss or its gradient is NaN or infinite", "unbroken runs show"),
    )


def too_slow_for_the_deadline(trial: Trial) -> Alarm:
    """From the start, until all is quicker."""
    return Alarm(
        fault="a deadline is too near for the speed",
        alert="DeadlineWillBeMissed",
        windows=("deadline", "group_wait"),
        fire=trial.start_all,
        heal=lambda: _write(trial.agents.folder / "slow", "0"),
        says=("will be done", "after its deadline"),
    )


def _lasting(faults: Sequence[Lasting], **more: Any) -> Alarm:
    def fire() -> None:
        for fault in faults:
            fault.fire()

    def heal() -> None:
        assert any(fault.fired for fault in faults)
        for fault in faults:
            fault.heal()

    return Alarm(fire=fire, heal=heal, **more)


def _write(file: Path, text: str) -> None:
    new = file.with_name(f"{file.name}.new")
    new.write_text(text)
    new.replace(file)
