"""Every fault does what it says, says so by what was seen of it, and is over when it is healed."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.faults import machine
from tests.faults.hosts import Cluster, Host
from tests.faults.injectors import KillProcess, Stop
from tests.faults.machine import Clock, FullDisk, PowerLoss, SlowCpu
from tests.faults.network import Cut, Delay, SlowNetwork, StoreTrouble
from tests.faults.proxy import LosingProxy
from tests.faults.relay import Line, Trouble
from tests.faults.talking import (
    PATIENCE_SECONDS,
    SILENCE_SECONDS,
    arrives,
    connect,
    connection,
    hears,
    http_status,
    seconds_to_send,
)
from tests.waiting import wait_until

SPIN = (sys.executable, "-ISc", "while True: pass")
REFUSED = (ConnectionResetError, ConnectionRefusedError)


def wait_until_quick(source: socket.socket, target: socket.socket, *, seconds: float, num_bytes: int = 1) -> None:
    """Until so many bytes take less than that: however busy this machine is, it is not so at every moment."""
    wait_until(lambda: seconds_to_send(source, target, num_bytes) < seconds, what="bytes that nothing holds back")


def test_cut_stops_what_goes_between_two_hosts_and_heal_lets_it_go_on(cluster: Cluster) -> None:
    one, two, three = cluster.hosts
    with connection(one, two) as (here, there), connection(one, three) as (beside, elsewhere):
        with Cut(one, two) as cut:
            assert not cut.fired, "nobody has said a word yet"
            assert not arrives(here, there)
            assert not arrives(there, here)
            assert cut.fired
            assert arrives(beside, elsewhere, within_seconds=PATIENCE_SECONDS)
        assert hears(there), "the words of before are sent again"
        assert hears(here)
        num_packets = cut.num_packets
        assert num_packets >= 2
        assert arrives(here, there, within_seconds=PATIENCE_SECONDS)
        assert cut.num_lost() == num_packets


def test_one_way_cut_lets_the_other_way_through(cluster: Cluster) -> None:
    one, two, _ = cluster.hosts
    with connection(one, two) as (here, there), Cut(one, two, is_one_way=True) as cut:
        assert arrives(there, here, within_seconds=PATIENCE_SECONDS)
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
            assert arrives(here, there, within_seconds=PATIENCE_SECONDS)
        with Cut(two) as cut:
            assert not arrives(here, there)
            assert not arrives(there, here)
            assert cut.fired
            assert http_status(one, cluster.store_endpoint) == 200
    assert http_status(two, cluster.store_endpoint) == 200


def test_bandwidth_of_a_host_is_what_it_is_told(cluster: Cluster) -> None:
    one, two, three = cluster.hosts
    num_bytes, slow, enough = 500_000, SlowNetwork(one, 1_000_000), 0.25
    with connection(one, two) as (here, there), connection(three, two) as (beside, elsewhere):
        wait_until_quick(here, there, seconds=enough, num_bytes=num_bytes)
        assert not slow.fired
        with slow:
            took = [seconds_to_send(here, there, num_bytes), seconds_to_send(there, here, num_bytes)]
            assert slow.fired
            wait_until_quick(beside, elsewhere, seconds=enough, num_bytes=num_bytes)
        assert slow.fired
        wait_until_quick(here, there, seconds=enough, num_bytes=num_bytes)
    assert min(took) > enough


def test_delay_is_that_of_new_connections_between_two_hosts(cluster: Cluster) -> None:
    one, two, three = cluster.hosts
    with connection(one, two) as (early, receiver), Delay(one, two, Line(latency_seconds=0.2)) as delay:
        wait_until_quick(early, receiver, seconds=0.2)
        assert not delay.fired
        for source, target in ((one, two), (two, one)):
            with connection(source, target) as (here, there):
                assert seconds_to_send(here, there, 1) > 0.2
                assert seconds_to_send(there, here, 1) > 0.2
        assert delay.fired
        with connection(one, three) as (here, there):
            wait_until_quick(here, there, seconds=0.2)


def test_delay_may_differ_from_word_to_word_and_limit_what_goes_through(cluster: Cluster) -> None:
    one, two, _ = cluster.hosts
    with Delay(one, two, Line(jitter_seconds=0.1)), connection(one, two) as (here, there):

        def differ() -> bool:
            took = [seconds_to_send(here, there, 1) for _ in range(8)]
            return max(took) > 2 * min(took)

        wait_until(differ, what="words that take longer than others")
    with Delay(one, two, Line(bytes_per_second=1_000_000)), connection(one, two) as (here, there):
        assert seconds_to_send(here, there, 500_000) > 0.25


def test_killed_process_is_dead(host: Host) -> None:
    process = host.start(["sleep", "60"])
    kill = KillProcess(psutil.Process(process.pid))
    kill.fire()
    assert kill.fired
    assert process.wait(timeout=120) == -9
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
    wait_until(lambda: spinner.cpu_times().user > used, what="it to go on")
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
        assert arrives(here, there, within_seconds=PATIENCE_SECONDS)


@pytest.mark.parametrize("may_use_cgroup", [True, False])
def test_slow_processor(host: Host, may_use_cgroup: bool) -> None:
    if may_use_cgroup and not os.access(machine.CPU_GROUPS / "cpu.cfs_quota_us", os.W_OK):
        pytest.skip("no cgroup v1 here")
    host.start(SPIN)
    (spinner,) = wait_until(host.processes, what="the process")

    def slows_down() -> bool:
        """Not if it had to wait for others all the time, or if who stops it had to."""
        with SlowCpu(host, 0.1, may_use_cgroup=may_use_cgroup) as slow:
            before, used = time.monotonic(), spinner.cpu_times().user
            time.sleep(0.8)
            share = (spinner.cpu_times().user - used) / (time.monotonic() - before)
        return share < 0.3 and slow.fired

    wait_until(slows_down, what="a share that is as small as it was told")
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

    def status(source: Host, *, timeout_seconds: float = PATIENCE_SECONDS) -> int:
        return http_status(source, cluster.store_endpoint, timeout_seconds=timeout_seconds)

    for trouble in Trouble:
        with StoreTrouble(cluster.store, trouble, maybe_host) as away:
            num_before = away.num_struck  # the last client's connection may not have ended yet
            if trouble is Trouble.ANSWERED_503:
                assert status(one) == 503
            elif trouble is Trouble.REFUSED:
                with pytest.raises(REFUSED):
                    status(one)
            else:
                with pytest.raises(TimeoutError):
                    status(one, timeout_seconds=SILENCE_SECONDS)
            wait_until(
                lambda away=away, before=num_before: away.num_struck > before,  # type: ignore[misc]
                what="the relay to see whom it struck",
            )
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
            assert not hears(client, within_seconds=SILENCE_SECONDS)
            wait_until(lambda: away.fired, what="the relay to see whom it struck")
        assert hears(client), "it is answered late"
        with StoreTrouble(cluster.store, Trouble.REFUSED) as away, pytest.raises(ConnectionResetError):
            hears(client)
        assert away.fired


def test_replies_are_lost_by_a_proxy_between_the_hosts_and_the_store(answering: str) -> None:
    with LosingProxy(answering) as proxy, Cluster(1, store=proxy.endpoint) as cluster:
        proxy.lose_replies("GET")
        with pytest.raises(http.client.RemoteDisconnected):
            http_status(cluster.hosts[0], cluster.store_endpoint)
        assert proxy.num_lost == 1
        assert http_status(cluster.hosts[0], cluster.store_endpoint) == 200
