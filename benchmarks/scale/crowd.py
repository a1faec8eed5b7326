"""The protocol's own code on simulated time (tests/simulation), with many nodes: what is told, and asked of the record.

It counts, and times nothing: its beats and waits are those of the simulation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tests.simulation.faults import Fault
from tests.simulation.network import Network
from tests.simulation.store import Change, Reply, SimulatedStore, unchanged
from tests.simulation.world import World
from training.cluster.protocol import Status
from training.runs.record import Record

if TYPE_CHECKING:
    from tests.simulation.agent import SimulatedAgent

MANY = 1_000_000
SETTLE_SECONDS, LIMIT_SECONDS = 4.0, 60.0


class Crowd(World):
    """So many nodes, and no fault but those that are asked for."""

    def __init__(self, num_nodes: int) -> None:
        super().__init__(seed=num_nodes)
        placed, self.num_nodes, self.num_hosts, self.min_nodes = self.num_nodes, num_nodes, num_nodes, 1
        self.num_steps = self.save_every = MANY
        self.counts: Counter[str] = Counter()
        self.store = CountedStore(self, Record(key="k"))
        self.network = CountedNetwork(self)
        self.engine_is_away = False
        for number in range(placed, num_nodes):
            self.plan(2.0 * self.random(), self.place, number, number)

    def place(self, number: int, host: int) -> None:
        if not self.engine_is_away:
            super().place(number, host)

    def until(self, is_so: Callable[[], bool]) -> None:
        end = self.agenda.now + LIMIT_SECONDS
        while not is_so():
            assert self.agenda.step(end), "it did not come about"

    def counted(self, do: Callable[[], object], num_members: int) -> dict[str, int]:
        """From there until so many train together."""
        self.counts.clear()
        do()
        self.until(lambda: self._trains(num_members))
        return dict(self.counts)

    def _trains(self, num_members: int) -> bool:
        members = self.store.record.members
        living = [agent for agent in self.agents if agent.is_alive]
        tokens = {agent.node.maybe_group.token for agent in living if agent.node.maybe_group is not None}
        is_whole = all(agent.node.phase == "training" for agent in living) and tokens == {self.store.record.token}
        return len(members) == len(living) == num_members and is_whole

    def rest(self) -> None:
        end = self.agenda.now + SETTLE_SECONDS
        while self.agenda.step(end):
            pass


class CountedStore(SimulatedStore):
    _world: Crowd

    def _apply(self, host: int, change: Change, reply: Reply, token: int | None, on_fence: Reply) -> None:
        before = self.record
        super()._apply(host, change, reply, token, on_fence)
        self._world.counts[_kind(change, before, self.record, token)] += 1


def _kind(change: Change, before: Record, after: Record, maybe_token: int | None) -> str:
    if change is unchanged:
        return "reads"
    if maybe_token is not None:
        return "commits"
    if after.token > before.token:
        return "groups"
    return "renewals" if after != before else "late proposals"


class CountedNetwork(Network):
    _world: Crowd

    def tell(self, sender: SimulatedAgent, status: Status) -> None:
        self._world.counts["messages"] += len(sender.links)
        super().tell(sender, status)


def measure(num_nodes: int) -> dict[str, Any]:
    """All begin; the last is killed; it is placed again."""
    crowd = Crowd(num_nodes)
    found: dict[str, Any] = {"num_nodes": num_nodes, "start": crowd.counted(lambda: None, num_nodes)}
    crowd.rest()
    crowd.engine_is_away = True
    last = max(crowd.agents, key=lambda agent: agent.number)
    kill = Fault(name="kill agent", at=0.0, target=0, seconds=0.0, choice=0.0)
    found["change"] = crowd.counted(lambda: kill.strike(crowd, last), num_nodes - 1)
    crowd.rest()
    crowd.engine_is_away = False
    found["arrival"] = crowd.counted(lambda: crowd.place(last.number, last.host), num_nodes)
    return found
