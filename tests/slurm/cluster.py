"""A real Slurm cluster on this one machine: a controller, and nodes with fake GPUs, each on a host of its own.

Up within seconds, without systemd, cgroups or a database. What is set here, and why, is in docs/slurm.md.
"""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from urllib.parse import urlsplit

import pytest

from tests.faults.hosts import Cluster, Host
from tests.faults.relay import Relay
from tests.waiting import wait_until

COMMANDS = {"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "munged": "munge"}
CLIENTS = ("sbatch", "scancel", "scontrol", "sinfo", "squeue")
CONFIGURATION = Path("/etc/slurm")
"""Where Slurm's commands look, and each host finds the cluster's."""
FAKE_GPU = os.makedev(1, 3)
"""/dev/null's: Slurm wants a character device."""


class SlurmCluster:
    """`num_nodes` nodes n1, n2, …, in two partitions: `high` takes nodes from `low`, which is asked for by default.

    `store`: the endpoint of a store on this machine's loopback, which every node then finds at the same address.
    """

    def __init__(
        self,
        folder: Path,
        *,
        num_nodes: int = 4,
        store: str | None = None,
        num_cpus: int = 4,
        num_gpus: int = 2,
        grace_seconds: int = 15,
        slurmd_timeout_seconds: int = 5,
    ) -> None:
        self.folder = folder
        self.commands = folder / "commands"
        """For `[slurm] commands`: they run on the controller's host."""
        self.num_nodes = num_nodes
        self._store = store
        self._num_cpus = num_cpus
        self._num_gpus = num_gpus
        self._grace_seconds = grace_seconds
        self._slurmd_timeout_seconds = slurmd_timeout_seconds
        self._relays: list[Relay] = []
        self.slurmctld: subprocess.Popen[str]

    def __enter__(self) -> SlurmCluster:
        require_slurm()
        self._cluster = Cluster(1 + self.num_nodes)
        self._cluster.__enter__()
        try:
            self._write_files()
            self._start_munge()
            self.start_controller()
            for number in range(1, 1 + self.num_nodes):
                self._boot(number)
            self.wait_for_idle(self.num_nodes)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._cluster.__exit__(kind, error, traceback)
        for relay in self._relays:
            relay.close()

    @property
    def controller(self) -> Host:
        return self._cluster.hosts[0]

    def host(self, name: str) -> Host:
        """That of a node."""
        return self._cluster.hosts[int(name.removeprefix("n"))]

    def run(self, command: str, *arguments: str) -> str:
        done = subprocess.run(
            [self.commands / command, *arguments], capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def wait_for_idle(self, num_nodes: int) -> None:
        def look() -> bool:
            done = subprocess.run(
                [self.commands / "sinfo", "--noheader", "--Node", "--partition=low", "--format=%T"],
                capture_output=True,
                text=True,
                check=False,
            )
            return done.stdout.split().count("idle") >= num_nodes

        wait_until(look, what=f"{num_nodes} idle nodes")

    def kill_node(self, name: str) -> None:
        """Its cable goes first, and then all that runs on it."""
        self.host(name).power_off()

    def boot_node(self, name: str) -> None:
        self.host(name).power_on()
        self._boot(int(name.removeprefix("n")))

    def wait_until_saved(self, job_id: str) -> None:
        """The controller writes down what it knows seconds later; killed before that, it forgets its newest jobs."""
        now = time.time()
        self.run("scontrol", "update", f"JobId={job_id}", "Comment=saved")
        saved = self.folder / "state" / "job_state"
        wait_until(lambda: saved.exists() and saved.stat().st_mtime > now, what="the controller to save its state")

    def start_controller(self) -> None:
        log = str(self.folder / "slurmctld.out")
        self.slurmctld = self._daemon(self.controller, "ctl", "slurmctld -D", log)

    def kill_controller(self) -> None:
        for process in self.controller.processes():
            if process.name() == "slurmctld":
                process.kill()
        assert self.slurmctld.wait(timeout=120) != 0

    def reach(self, host: Host, endpoint: str) -> None:
        """A server on this machine's loopback is found at the same address by that host, until that is switched off."""
        where = urlsplit(endpoint)
        address = (str(where.hostname), int(where.port or 80))
        listener = host.namespace.inside(lambda: socket.create_server(address, backlog=128))
        self._relays.append(Relay(listener, upstream=address))

    def _boot(self, number: int) -> None:
        host = self._cluster.hosts[number]
        if self._store is not None:
            self.reach(host, self._store)
        self._daemon(host, f"n{number}", f"slurmd -D -N n{number}", str(self.folder / f"slurmd-n{number}.out"))

    def _daemon(self, host: Host, name: str, command: str, log: str) -> subprocess.Popen[str]:
        """In the foreground, on a host that has a name of its own, and finds Slurm's configuration where it looks."""
        prepare = f"hostname {name}; mount --bind {self.folder}/etc {CONFIGURATION}"
        with open(log, "a") as file:
            return host.start(["unshare", "--uts", "sh", "-c", f"{prepare}; exec {command}"], stdout=file, stderr=file)

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        options = {
            "key-file": key,
            "socket": self._socket,
            "pid-file": self.folder / "munged.pid",
            "log-file": self.folder / "munged.log",
            "seed-file": self.folder / "munge.seed",
        }
        arguments = [f"--{name}={value}" for name, value in options.items()]
        with (self.folder / "munged.out").open("w") as log:
            self.controller.start(["munged", "--force", "--foreground", *arguments], stdout=log, stderr=log)
        wait_until(lambda: self._socket.exists(), what="munge to answer")

    @property
    def _socket(self) -> Path:
        return self.folder / "munge.sock"

    def _write_files(self) -> None:
        for name in ("etc", "state", "spool", "commands"):
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o755)
        gpus = [self.folder / f"gpu{number}" for number in range(self._num_gpus)]
        for gpu in gpus:
            os.mknod(gpu, 0o666 | stat.S_IFCHR, FAKE_GPU)
        etc = self.folder / "etc"
        (etc / "slurm.conf").write_text(self._configuration())
        names = f"n[1-{self.num_nodes}]"
        devices = f"{self.folder}/gpu[0-{self._num_gpus - 1}]"
        (etc / "gres.conf").write_text(f"NodeName={names} Name=gpu Type=fake File={devices}\n")
        (etc / "cgroup.conf").write_text("CgroupAutomount=no\nCgroupPlugin=cgroup/v1\n")
        for command in CLIENTS:
            path = self.commands / command
            path.write_text(
                f"#!/bin/sh\nexec nsenter --net=/proc/{self.controller.namespace.pid}/ns/net"
                f' env SLURM_CONF={etc}/slurm.conf {shutil.which(command)} "$@"\n'
            )
            path.chmod(0o755)

    def _configuration(self) -> str:
        given: Mapping[str, str | int] = {
            "ClusterName": "test",
            "SlurmctldHost": f"ctl({self.controller.address})",
            "SlurmUser": "root",
            "SlurmdUser": "root",
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={self._socket},cred_expire=5",  # the default, 120 s, delays every requeue
            "CredType": "cred/munge",
            "StateSaveLocation": self.folder / "state",
            "SlurmdSpoolDir": f"{self.folder}/spool/%n",
            "SlurmctldPidFile": f"{self.folder}/slurmctld.pid",
            "SlurmdPidFile": f"{self.folder}/slurmd-%n.pid",
            "SlurmctldLogFile": f"{self.folder}/slurmctld.log",
            "SlurmdLogFile": f"{self.folder}/slurmd-%n.log",
            "SlurmdParameters": "config_overrides",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "SwitchType": "switch/none",
            "MpiDefault": "none",
            "ReturnToService": 2,
            "SlurmdTimeout": self._slurmd_timeout_seconds,
            "SlurmctldTimeout": 10,
            "InactiveLimit": 0,
            "KillWait": 5,
            "UnkillableStepTimeout": 30,
            "MessageTimeout": 5,
            "BatchStartTimeout": 5,
            "JobRequeue": 1,
            "SchedulerType": "sched/backfill",
            "SchedulerParameters": "bf_interval=2,sched_interval=2,batch_sched_delay=1,sched_min_interval=200000,"
            "requeue_delay=1",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core_Memory",
            "DefMemPerCPU": 500,
            "PriorityType": "priority/basic",
            "PreemptType": "preempt/partition_prio",
            "PreemptMode": "REQUEUE",
            "PreemptExemptTime": "00:00:00",
            "AccountingStorageType": "accounting_storage/none",
            "JobAcctGatherType": "jobacct_gather/none",
            "GresTypes": "gpu",
        }
        nodes = [
            f"NodeName=n{number} NodeHostname=n{number} NodeAddr={self._cluster.hosts[number].address}"
            f" CPUs={self._num_cpus} RealMemory=4000 Gres=gpu:fake:{self._num_gpus} State=UNKNOWN"
            for number in range(1, 1 + self.num_nodes)
        ]
        names = f"n[1-{self.num_nodes}]"
        partitions = [
            f"PartitionName=low Nodes={names} Default=YES PriorityTier=1 PreemptMode=REQUEUE"
            f" GraceTime={self._grace_seconds} MaxTime=1:00:00 State=UP",
            f"PartitionName=high Nodes={names} PriorityTier=10 PreemptMode=OFF MaxTime=1:00:00 State=UP",
        ]
        return "\n".join([*(f"{name}={value}" for name, value in given.items()), *nodes, *partitions, ""])


def require_slurm() -> None:
    """Skips the test, with the reason, where no cluster can be."""
    missing = [
        f"command {name} (package {package})" for name, package in COMMANDS.items() if shutil.which(name) is None
    ]
    if not CONFIGURATION.is_dir():
        missing.append(f"folder {CONFIGURATION} (package slurm-client)")
    if missing:
        pytest.skip(f"no {', '.join(missing)}")
