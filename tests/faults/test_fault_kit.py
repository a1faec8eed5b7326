"""Every fault does what it says, says so by what was seen of it, and is over when it is healed."""

from __future__ import annotations

import contextlib
import http.server
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.faults import machine
from tests.faults.hosts import Cluster, Host
from tests.faults.injectors import KillProcess, Stop
from tests.faults.machine import Clock, FullDisk, PowerLoss, SlowCpu
from tests.faults.network import Cut, Delay, SlowNetwork, StoreTrouble
from tests.faults.relay import Line, Trouble
from tests.faults.talking import arrives, connect, connection, hears, http_status, seconds_to_send
from tests.waiting import wait_until

SPIN = (sys.executable, "-ISc", "while True: pass")
REFUSED = (ConnectionResetError, ConnectionRefusedError)


class Answer(http.server.BaseHTTPRequestHandler):
    """Stands in for a store: 200 to everybody."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def handle(self) -> None:
        with contextlib.suppress(ConnectionResetError):
            super().handle()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Each test leaves it as it was."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        with Cluster(3, store=f"http://127.0.0.1:{server.server_address[1]}") as running:
            yield running
        server.shutdown()


@pytest.fixture
def host(cluster: Cluster) -> Iterator[Host]:
    yield cluster.hosts[0]
    cluster.hosts[0].kill_all()


def test_hosts_hear_one_another_and_nobody_else(cluster: Cluster) -> None:
    one, two, three = cluster.hosts
    for source, target in ((one, two), (two, one), (one, three)):
        with connection(source, target) as (here, there):
            assert here.getsockname()[0] == source.address == there.getpeername()[0]
            assert arrives(here, there, within_seconds=5)
            assert arrives(there, here, within_seconds=5)
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
    assert host.processes() == []
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
    groups = sorted(str(path) for path in machine.CPU_GROUPS.glob("unbroken-test-*"))
    return [kept, routes, groups, sorted(psutil.net_if_addrs()), Path("/proc/mounts").read_text()]


def test_nothing_is_left(tmp_path: Path) -> None:
    before = None
    with Cluster(0):
        before = traces()
    with Cluster(2, bandwidth=10_000_000) as cluster:
        one, two = cluster.hosts
        spaces = [host.namespace for host in cluster.hosts] + [cluster.router.namespace]
        namespaces = {os.readlink(f"/proc/{space.pid}/ns/net") for space in spaces}
        one.mount_disk(tmp_path, mebibytes=1)
        processes = [one.start(["sh", "-c", "setsid sleep 60 & exec sleep 60"]), two.start(SPIN)]
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
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == -9, done.stderr
    namespaces = set(done.stdout.split())
    assert len(namespaces) == 2
    wait_until(lambda: not left_by(namespaces), what="all that ran in the cluster to be gone", timeout_seconds=10)


def test_cut_stops_what_goes_between_two_hosts_and_heal_lets_it_go_on(cluster: Cluster) -> None:
    one, two, three = cluster.hosts
    with connection(one, two) as (here, there), connection(one, three) as (beside, elsewhere):
        with Cut(one, two) as cut:
            assert not cut.fired, "nobody has said a word yet"
            assert not arrives(here, there)
            assert not arrives(there, here)
            assert cut.fired
            assert arrives(beside, elsewhere, within_seconds=5)
        assert hears(there), "the words of before are sent again"
        assert hears(here)
        num_packets = cut.num_packets
        assert num_packets >= 2
        assert arrives(here, there, within_seconds=5)
        assert cut.num_lost() == num_packets


def test_one_way_cut_lets_the_other_way_through(cluster: Cluster) -> None:
    one, two, _ = cluster.hosts
    with connection(one, two) as (here, there), Cut(one, two, is_one_way=True) as cut:
        assert arrives(there, here, within_seconds=5)
        assert not arrives(here, there)
        assert cut.fired


def test_host_may_be_cut_off_from_all_or_from_the_store_only(cluster: Cluster) -> None:
    one, two, _ = cluster.hosts
    with connection(one, two) as (here, there):
        with Cut(one, cluster.router) as cut:
            with pytest.raises(TimeoutError):
                http_status(one, cluster.store_endpoint, timeout_seconds=0.3)
            assert cut.fired
            assert http_status(two, cluster.store_endpoint) == 200
            assert arrives(here, there, within_seconds=5)
        with Cut(two) as cut:
            assert not arrives(here, there)
            assert not arrives(there, here)
            assert cut.fired
            assert http_status(one, cluster.store_endpoint) == 200
    assert http_status(two, cluster.store_endpoint) == 200


def test_bandwidth_of_a_host_is_what_it_is_told(cluster: Cluster) -> None:
    one, two, three = cluster.hosts
    num_bytes, slow = 500_000, SlowNetwork(one, 1_000_000)
    with connection(one, two) as (here, there), connection(three, two) as (beside, elsewhere):
        calm = seconds_to_send(here, there, num_bytes)
        assert not slow.fired
        with slow:
            for source, target in ((here, there), (there, here)):
                assert 0.25 < seconds_to_send(source, target, num_bytes) < 2.5
            assert slow.fired
            assert seconds_to_send(beside, elsewhere, num_bytes) < 0.25
        assert slow.fired
        assert max(calm, seconds_to_send(here, there, num_bytes)) < 0.25


def test_delay_is_that_of_new_connections_between_two_hosts(cluster: Cluster) -> None:
    one, two, three = cluster.hosts
    with connection(one, two) as (early, receiver), Delay(one, two, Line(latency_seconds=0.2)) as delay:
        assert seconds_to_send(early, receiver, 1) < 0.2
        assert not delay.fired
        for source, target in ((one, two), (two, one)):
            with connection(source, target) as (here, there):
                assert 0.2 < seconds_to_send(here, there, 1000) < 1.0
                assert 0.2 < seconds_to_send(there, here, 1000) < 1.0
        assert delay.fired
        with connection(one, three) as (here, there):
            assert seconds_to_send(here, there, 1) < 0.2


def test_delay_may_differ_from_word_to_word_and_limit_what_goes_through(cluster: Cluster) -> None:
    one, two, _ = cluster.hosts
    with Delay(one, two, Line(jitter_seconds=0.1)), connection(one, two) as (here, there):
        took = [seconds_to_send(here, there, 1) for _ in range(8)]
        assert max(took) > 2 * min(took)
    with Delay(one, two, Line(bytes_per_second=1_000_000)), connection(one, two) as (here, there):
        assert 0.25 < seconds_to_send(here, there, 500_000) < 2.5


def test_killed_process_is_dead(host: Host) -> None:
    process = host.start(["sleep", "60"])
    kill = KillProcess(psutil.Process(process.pid))
    kill.fire()
    assert kill.fired
    assert process.wait(timeout=5) == -9
    again = KillProcess(kill.victim)
    again.fire()
    assert not again.fired, "it was dead before"


def test_stopped_process_does_nothing_until_it_is_continued(host: Host) -> None:
    host.start(SPIN)
    (spinner,) = wait_until(host.processes, what="the process")
    with Stop([spinner]) as stop:
        assert stop.fired
        assert spinner.status() == psutil.STATUS_STOPPED
        used = spinner.cpu_times().user
        time.sleep(0.1)
        assert spinner.cpu_times().user == used
    wait_until(lambda: spinner.cpu_times().user > used, what="it to go on", timeout_seconds=10)
    assert spinner.status() != psutil.STATUS_STOPPED


def test_host_without_power_is_silent_and_comes_back_empty(cluster: Cluster) -> None:
    one, two, _ = cluster.hosts
    process = two.start(SPIN)
    with connection(one, two) as (here, there):
        talker = there.dup()
        with PowerLoss(two) as loss:
            assert loss.fired
            assert process.returncode == -9
            assert not hears(here, within_seconds=0.3), "nobody says that the connection is over"
            with pytest.raises(TimeoutError):
                connect(one, two.address, 1, timeout_seconds=0.3)
            assert two.processes() == []
        talker.close()
    assert two.processes() == []
    with connection(one, two) as (here, there):
        assert arrives(here, there, within_seconds=5)


@pytest.mark.parametrize("may_use_cgroup", [True, False])
def test_slow_processor(host: Host, may_use_cgroup: bool) -> None:
    if may_use_cgroup and not os.access(machine.CPU_GROUPS / "cpu.cfs_quota_us", os.W_OK):
        pytest.skip("no cgroup v1 here")
    host.start(SPIN)
    (spinner,) = wait_until(host.processes, what="the process")
    with SlowCpu(host, 0.1, may_use_cgroup=may_use_cgroup) as slow:
        before, used = time.monotonic(), spinner.cpu_times().user
        time.sleep(0.8)
        share = (spinner.cpu_times().user - used) / (time.monotonic() - before)
    assert share < 0.3
    assert slow.fired
    assert spinner.status() != psutil.STATUS_STOPPED


def test_clock_goes_wrong_under_a_process(host: Host, tmp_path: Path) -> None:
    clock = Clock(host, tmp_path / "clock", seconds=-3600)
    program = "import sys, time\nfor _ in sys.stdin: print(time.time(), time.monotonic(), flush=True)"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = host.start([sys.executable, "-ISc", program], env=clock.environment, **pipes)
    assert process.stdin is not None
    assert process.stdout is not None
    ask, answers = process.stdin, process.stdout

    def told() -> list[float]:
        print(file=ask, flush=True)
        return [float(word) for word in answers.readline().split()]

    assert abs(told()[0] - time.time()) < 60
    assert not clock.fired
    with clock:
        wall, monotonic = told()
        assert abs(wall - (time.time() - 3600)) < 60
        assert abs(monotonic - time.monotonic()) < 60
        assert clock.fired
    assert abs(told()[0] - time.time()) < 60
    ask.close()
    answers.close()


def test_full_disk_of_a_host(host: Host, tmp_path: Path) -> None:
    disk = FullDisk(host.mount_disk(tmp_path, mebibytes=2))

    def write(name: str) -> str:
        return host.output(["sh", "-c", f"echo word | tee {tmp_path}/{name}"])

    assert write("early") == "word\n"
    with disk:
        assert disk.fired
        with pytest.raises(AssertionError, match="No space left"):
            write("late")
    assert write("later") == "word\n"
    assert list(tmp_path.iterdir()) == [], "nobody else sees it"
    with pytest.raises(AssertionError, match="a disk of this machine"):
        FullDisk(Path("/")).fire()


@pytest.mark.parametrize("is_for_all", [True, False])
def test_troubles_of_the_store(cluster: Cluster, is_for_all: bool) -> None:
    one, two, _ = cluster.hosts
    maybe_host = None if is_for_all else one

    def status(source: Host) -> int:
        return http_status(source, cluster.store_endpoint, timeout_seconds=0.5)

    for trouble in Trouble:
        with StoreTrouble(cluster.store, trouble, maybe_host) as away:
            num_before = away.num_struck  # the last client's connection may not have ended yet
            if trouble is Trouble.ANSWERED_503:
                assert status(one) == 503
            else:
                with pytest.raises(REFUSED if trouble is Trouble.REFUSED else TimeoutError):
                    status(one)
            assert away.num_struck == num_before + 1
            assert away.fired
            if not is_for_all:
                assert status(two) == 200
        assert status(one) == 200


def test_connection_that_is_open_feels_the_trouble(cluster: Cluster) -> None:
    one, *_ = cluster.hosts
    request = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    with connect(one, cluster.router.address, cluster.store.port) as client:
        client.sendall(request)
        assert hears(client)
        with StoreTrouble(cluster.store, Trouble.HANGING, one) as away:
            client.sendall(request)
            assert not hears(client, within_seconds=0.3)
            assert away.fired
        assert hears(client), "it is answered late"
        with StoreTrouble(cluster.store, Trouble.REFUSED) as away, pytest.raises(ConnectionResetError):
            hears(client)
        assert away.fired
