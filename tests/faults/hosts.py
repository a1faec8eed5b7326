"""Hosts of a test's own on this one machine: each a network namespace with processes, an address and a cable.

All cables end in a router, itself a namespace, which is where the network is disturbed: what is dropped there is lost
on the way, as neither host's kernel knows. No address of a cluster is seen outside it, so all clusters have the same.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import psutil

from tests.faults.namespaces import Namespace, require_namespaces
from tests.faults.relay import Relay

SUBNET, ROUTER_ADDRESS = "10.77.0.0/24", "10.77.0.254"
INTERFACE = "eth0"
MIN_BURST_BYTES = 16 << 10


class Router:
    """Every host's next hop. What is for a host that is away is lost on it, without a word to who sent it."""

    def __init__(self) -> None:
        self.address = ROUTER_ADDRESS
        self.namespace = Namespace()
        self.relays: list[Relay] = []
        """Those that are closed with the router."""
        self.namespace.execute(["sysctl", "-q", "-w", "net.ipv4.ip_forward=1"])
        self.ip(f"address add {ROUTER_ADDRESS}/32 dev lo", "link set lo up", f"route add blackhole {SUBNET}")

    def ip(self, *commands: str) -> None:
        self.namespace.execute(["ip", "-batch", "-"], given="\n".join(commands) + "\n")

    def change_rules(self, table: str, *lines: str) -> None:
        """In the language of iptables-save: all of them at once, or none."""
        script = "\n".join([f"*{table}", *lines, "COMMIT", ""])
        self.namespace.execute(["iptables-restore", "--wait", "--noflush"], given=script)

    def plug_in(self, host: Host) -> None:
        self.ip(
            f"link add {host.port} type veth peer name {INTERFACE} netns {host.namespace.pid}",
            f"link set {host.port} up",
            f"route add {host.address} dev {host.port} src {ROUTER_ADDRESS}",
        )

    def unplug(self, host: Host) -> None:
        """The kernel does so too when the host's network is gone, sooner or later."""
        self.namespace.execute(["sh", "-c", f"ip link delete {host.port} 2> /dev/null || true"])

    def close(self) -> None:
        for relay in self.relays:
            relay.close()
        self.namespace.close()


class Host:
    """One host of a cluster. It may lose its power, and then be started again with the same address."""

    def __init__(self, number: int, router: Router, *, bandwidth: int | None) -> None:
        self.number = number
        self.address = f"10.77.0.{number + 1}"
        self.port = f"port{number}"
        """The router's end of the cable."""
        self.router = router
        self._own_bandwidth = bandwidth
        self.is_on = False
        self.power_on()

    def power_on(self) -> None:
        """As it was made: nothing runs on it, and its cable is as good as at first."""
        assert not self.is_on
        self.namespace = Namespace()
        self.bandwidth: int | None = None
        self.router.plug_in(self)
        commands = [
            "link set lo up",
            f"address add {self.address}/32 dev {INTERFACE}",
            f"link set {INTERFACE} up",
            f"route add {ROUTER_ADDRESS} dev {INTERFACE} src {self.address}",
            f"route add default via {ROUTER_ADDRESS} src {self.address}",
        ]
        self.namespace.execute(["ip", "-batch", "-"], given="\n".join(commands) + "\n")
        self.is_on = True
        self.output(["mount", "--bind", "/dev/null", "/etc/resolv.conf"])  # else lookups wait for a name server in vain
        if self._own_bandwidth is not None:
            self.limit_bandwidth(self._own_bandwidth)

    def power_off(self) -> None:
        """The cable goes first: nobody is told that the connections are over."""
        if self.is_on:
            self.is_on = False
            self.router.ip(f"link set {self.port} down")
            self.namespace.close()
            self.router.unplug(self)

    def start(
        self, command: Sequence[str], *, env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[str]:
        """A process on this host, in this process's folder and environment with `env` added to it."""
        assert self.is_on
        return self.namespace.start(command, env=env, **options)

    def output(self, command: Sequence[str], *, timeout_seconds: float = 30.0, **options: Any) -> str:
        """What a command prints that runs on this host, and succeeds."""
        process = self.start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
        output, complaints = process.communicate(timeout=timeout_seconds)
        assert process.returncode == 0, complaints
        return output

    def mount_disk(self, folder: Path, *, mebibytes: int) -> Path:
        """A disk over `folder` that this host alone sees; returns where others find it."""
        self.output(["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "none", str(folder)])
        return Path(f"/proc/{self.namespace.pid}/root{folder}")

    def processes(self) -> list[psutil.Process]:
        return self.namespace.processes() if self.is_on else []

    def kill_all(self) -> None:
        """`kill -9` of all processes at once. The host itself stays on: it ends their connections in due form."""
        self.namespace.kill_all()

    def limit_bandwidth(self, bytes_per_second: int | None) -> None:
        """In each direction; None takes the limit away."""
        self.bandwidth = bytes_per_second
        for namespace, device in self.cable_ends():
            if bytes_per_second is None:
                namespace.execute(["tc", "qdisc", "delete", "dev", device, "root"])
            else:
                burst = max(MIN_BURST_BYTES, bytes_per_second // 100)
                limit = f"rate {8 * bytes_per_second}bit burst {burst} latency 100ms"
                namespace.execute(["tc", "qdisc", "replace", "dev", device, "root", "tbf", *limit.split()])

    def cable_ends(self) -> Sequence[tuple[Namespace, str]]:
        return (self.namespace, INTERFACE), (self.router.namespace, self.port)


class Cluster:
    """`num_hosts` hosts, gone with all that runs on them when the context is left. `bandwidth` is in bytes per second.

    `store` is the endpoint of a store on this machine's own loopback; the hosts reach it at `store_endpoint`, through
    the relay `store`. Skips the test where there can be no hosts.
    """

    def __init__(self, num_hosts: int, *, store: str | None = None, bandwidth: int | None = None) -> None:
        self._num_hosts = num_hosts
        self._maybe_store = store
        self._bandwidth = bandwidth
        self.hosts: list[Host] = []

    def __enter__(self) -> Cluster:
        require_namespaces()
        self.router = Router()
        try:
            for number in range(self._num_hosts):
                self.hosts.append(Host(number, self.router, bandwidth=self._bandwidth))
            if self._maybe_store is not None:
                self.store = self._relay_to(self._maybe_store)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for host in self.hosts:
            host.power_off()
        self.router.close()

    @property
    def store_endpoint(self) -> str:
        return f"http://{self.router.address}:{self.store.port}"

    def _relay_to(self, endpoint: str) -> Relay:
        where = urlsplit(endpoint)
        assert where.hostname is not None
        assert where.port is not None
        relay = Relay(self.router.namespace.listen(ROUTER_ADDRESS), upstream=(where.hostname, where.port))
        self.router.relays.append(relay)
        return relay
