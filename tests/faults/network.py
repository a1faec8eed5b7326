"""Faults of a cluster's network. All of them happen on the way, at the router: neither end's kernel is told."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import TypeAlias

from tests.faults.hosts import Host, Router
from tests.faults.injectors import Lasting
from tests.faults.relay import EVERYONE, Line, Relay, Trouble

Party: TypeAlias = Host | Router
"""The router stands for the store, which the hosts reach there."""

HOOKS = ("PREROUTING", "OUTPUT")
"""Where packets are dropped: as they come from a host, and as they leave the store."""

_numbers = count()


@dataclass
class Cut(Lasting):
    """What `source` sends to `target`, and (unless it is one-way) the reverse, is lost.

    Without a `target`: to anybody. With the router as the target: to the store.
    """

    source: Host
    target: Party | None = None
    is_one_way: bool = False
    is_on: bool = field(default=False, init=False)
    num_packets: int = field(default=0, init=False)
    """Those lost, as the rules counted them until it was last healed."""

    def __post_init__(self) -> None:
        self._chain = f"cut{next(_numbers)}"

    def fire(self) -> None:
        rules = [f"-A {self._chain} {way} -j DROP" for way in self._ways()]
        self._tell(f":{self._chain} - [0:0]", *rules, *(f"-A {hook} -j {self._chain}" for hook in HOOKS))
        self.is_on = True

    def heal(self) -> None:
        self.num_packets = self.num_lost()
        self.is_on = False
        self._tell(*(f"-D {hook} -j {self._chain}" for hook in HOOKS), f"-F {self._chain}", f"-X {self._chain}")

    def num_lost(self) -> int:
        """Packets so far."""
        if not self.is_on:
            return self.num_packets
        rules = self.source.router.namespace.execute(["iptables", "-t", "mangle", "-nvxL", self._chain])
        return self.num_packets + sum(int(line.split()[0]) for line in rules.splitlines()[2:])

    @property
    def fired(self) -> bool:
        return self.num_lost() > 0

    def _ways(self) -> Sequence[str]:
        out, back = f"-s {self.source.address}", f"-d {self.source.address}"
        if self.target is not None:
            out, back = f"{out} -d {self.target.address}", f"{back} -s {self.target.address}"
        return [out] if self.is_one_way else [out, back]

    def _tell(self, *lines: str) -> None:
        """All at once or nothing. Before the router changes any address, whatever a `Delay` does."""
        self.source.router.change_rules("mangle", *lines)


@dataclass
class SlowNetwork(Lasting):
    """A host's cable carries this many bytes per second in each direction, and no more."""

    host: Host
    bytes_per_second: int
    num_held_back: int = field(default=0, init=False)
    """Times that a packet had to wait or was dropped, as the queues counted them until it was last healed."""

    def fire(self) -> None:
        self._before = self.host.bandwidth
        self.host.limit_bandwidth(self.bytes_per_second)

    def heal(self) -> None:
        if self.host.bandwidth == self.bytes_per_second:  # else it was off meanwhile
            self.num_held_back += self._counted()
            self.host.limit_bandwidth(self._before)

    @property
    def fired(self) -> bool:
        return self.num_held_back > 0 or self._counted() > 0

    def _counted(self) -> int:
        """By the queues at both ends of the cable, which begin anew with every limit."""
        if not self.host.is_on:
            return 0
        return sum(
            _num_held_back(namespace.execute(["tc", "-s", "-j", "qdisc", "show", "dev", device]))
            for namespace, device in self.host.cable_ends()
        )


def _num_held_back(queues: str) -> int:
    return sum(queue["overlimits"] + queue["drops"] for queue in json.loads(queues) if queue["kind"] == "tbf")


@dataclass
class Delay(Lasting):
    """The TCP connections that two hosts make to one another while it is on go through a relay, and stay there.

    A connection of two halves: what was sent is acknowledged by the relay. So do not `Cut` the same two at a time.
    """

    one: Host
    other: Host
    line: Line

    def __post_init__(self) -> None:
        self._relays: list[Relay] = []

    def fire(self) -> None:
        router = self.one.router
        relay = Relay(
            router.namespace.listen(router.address),
            upstream=None,
            line=self.line,
            enter_network=router.namespace.enter_network,
        )
        router.relays.append(relay)
        self._relays.append(relay)
        self._tell("-A")

    def heal(self) -> None:
        """The connections are quick again."""
        self._tell("-D")
        self._relays[-1].line = Line()

    @property
    def fired(self) -> bool:
        return any(relay.num_bytes_delayed for relay in self._relays)

    def _tell(self, action: str) -> None:
        where = f"--syn -j DNAT --to-destination {self.one.router.address}:{self._relays[-1].port}"
        ways = [(self.one.address, self.other.address), (self.other.address, self.one.address)]
        rules = [f"{action} PREROUTING -p tcp -s {source} -d {target} {where}" for source, target in ways]
        self.one.router.change_rules("nat", *rules)


@dataclass
class StoreTrouble(Lasting):
    """The store as seen by one host, or by all (None): it refuses connections, hangs, or answers 503."""

    relay: Relay
    trouble: Trouble
    host: Host | None = None

    def __post_init__(self) -> None:
        self._num_before = self._total()

    def fire(self) -> None:
        self.relay.make_trouble(self.trouble, client=self._client)

    def heal(self) -> None:
        self.relay.make_trouble(None, client=self._client)

    @property
    def _client(self) -> str:
        return EVERYONE if self.host is None else self.host.address

    @property
    def fired(self) -> bool:
        return self.num_struck > 0

    @property
    def num_struck(self) -> int:
        """Connections that met it."""
        return self._total() - self._num_before

    def _total(self) -> int:
        counts = list(self.relay.num_struck.items())
        return sum(n for (client, met), n in counts if met is self.trouble and self._client in (EVERYONE, client))
