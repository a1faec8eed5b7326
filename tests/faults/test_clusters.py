"""Hosts of a test's own are apart from one another and from this machine, and leave nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.faults import machine
from tests.faults.hosts import Cluster, Host
from tests.faults.machine import SlowCpu
from tests.faults.namespaces import require_namespaces
from tests.faults.network import Cut, Delay, SlowNetwork
from tests.faults.relay import Line
from tests.faults.talking import PATIENCE_SECONDS, arrives, connect, connection, http_status
from tests.waiting import wait_until


def test_hosts_hear_one_another_and_nobody_else(cluster: Cluster) -> None:
    one, two, three = cluster.hosts
    for source, target in ((one, two), (two, one), (one, three)):
        with connection(source, target) as (here, there):
            assert here.getsockname()[0] == source.address == there.getpeername()[0]
            assert arrives(here, there, within_seconds=PATIENCE_SECONDS)
            assert arrives(there, here, within_seconds=PATIENCE_SECONDS)
    port = cluster.store.port
    assert http_status(one, cluster.store_endpoint) == 200
    with pytest.raises(ConnectionRefusedError):
        connect(one, "127.0.0.1", port)
    with pytest.raises(OSError, match="unreachable"):
        connect(one, "192.0.2.1", port)


def test_processes_of_a_host_see_their_own_kind_only(host: Host, cluster: Cluster) -> None:
    sleeper = host.start(["sh", "-c", "sleep 60 & exec sleep 60"])
    wait_until(lambda: len(host.processes()) == 2, what="both processes")
    assert sleeper.pid in [process.pid for process in host.processes()]
    assert cluster.hosts[1].processes() == []
    count = "import os; print(sum(name.isdigit() for name in os.listdir('/proc')))"
    assert host.output([sys.executable, "-ISc", count]) == "4\n", "the holder, both, and who counts"
    assert host.output(["pwd"]).strip() == os.getcwd()
    assert host.output(["sh", "-c", "echo $WORD"], env={"WORD": "hello"}) == "hello\n"
    host.kill_all()
    wait_until(lambda: host.processes() == [], what="the holder to take note of its orphan's end")
    assert sleeper.returncode == -9


def test_clusters_at_once_know_nothing_of_one_another(cluster: Cluster) -> None:
    with Cluster(2) as other:
        assert other.hosts[1].address == cluster.hosts[1].address
        with cluster.hosts[1].namespace.listen(cluster.hosts[1].address) as listener:
            port = listener.getsockname()[1]
            with pytest.raises(ConnectionRefusedError):
                connect(other.hosts[0], other.hosts[1].address, port)
            connect(cluster.hosts[0], cluster.hosts[1].address, port).close()


def left_by(namespaces: set[str]) -> set[str]:
    """Those of these network namespaces in which something runs."""
    found = set()
    for pid in psutil.pids():
        try:
            found.add(os.readlink(f"/proc/{pid}/ns/net"))
        except OSError:
            continue
    return found & namespaces


def traces() -> list[object]:
    """What this machine's own network and control groups are, which no test may touch."""
    rules = subprocess.run(["iptables-save"], capture_output=True, text=True, check=True).stdout
    kept = [line for line in rules.splitlines() if not line.startswith("#")]
    routes = subprocess.run(["ip", "route"], capture_output=True, text=True, check=True).stdout
    groups = sorted(str(path) for path in machine.CPU_GROUPS.glob(f"{machine.GROUP}{os.getpid()}-*"))
    return [kept, routes, groups, sorted(psutil.net_if_addrs()), Path("/proc/mounts").read_text()]


def test_nothing_is_left(tmp_path: Path) -> None:
    require_namespaces()
    before = traces()
    with Cluster(2, bandwidth=10_000_000) as cluster:
        one, two = cluster.hosts
        spaces = [host.namespace for host in cluster.hosts] + [cluster.router.namespace]
        namespaces = {os.readlink(f"/proc/{space.pid}/ns/net") for space in spaces}
        one.mount_disk(tmp_path, mebibytes=1)
        processes = [one.start(["sh", "-c", "setsid sleep 60 & exec sleep 60"]), two.start(["sleep", "60"])]
        for fault in (Cut(one), Cut(one, two), Delay(one, two, Line()), SlowCpu(two, 0.5), SlowNetwork(one, 10_000)):
            fault.fire()
            if isinstance(fault, SlowCpu):
                fault.heal()
        assert traces() == before
        assert left_by(namespaces) == namespaces
    assert left_by(namespaces) == set()
    assert [process.returncode for process in processes] == [-9, -9]
    assert traces() == before


def test_nothing_is_left_of_a_test_that_is_killed(cluster: Cluster) -> None:
    program = (
        "import os\nfrom tests.faults.hosts import Cluster\n"
        "with Cluster(1) as c:\n"
        "    c.hosts[0].start(['sh', '-c', 'setsid sleep 60 & exec sleep 60'])\n"
        "    spaces = [c.hosts[0].namespace, c.router.namespace]\n"
        "    print(*[os.readlink(f'/proc/{space.pid}/ns/net') for space in spaces], flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == -9, done.stderr
    namespaces = set(done.stdout.split())
    assert len(namespaces) == 2
    wait_until(lambda: not left_by(namespaces), what="all that ran in the cluster to be gone")
