"""The simulated world: hosts, agents, an engine that places them, and one run. A pure function of its seed."""

from __future__ import annotations

from itertools import combinations
from math import inf
from random import Random
from typing import TYPE_CHECKING, Any

from tests.simulation.agent import SimulatedAgent
from tests.simulation.clock import Agenda, Clock
from tests.simulation.invariants import Invariants
from tests.simulation.network import Network
from tests.simulation.store import SimulatedStore
from tests.simulation.tracing import Tracing
from tests.simulation.workers import Group, Worker
from training.cluster.membership import is_over
from training.cluster.protocol import Event, Heard, Linked, Preempted, RecordSeen, Tick, Unlinked, WorkersEnded
from training.runs.record import Record

if TYPE_CHECKING:
    from tests.simulation.faults import Fault

MASK = (1 << 64) - 1
EVENT_CODES = {kind: n for n, kind in enumerate((Heard, RecordSeen, Linked, Unlinked, WorkersEnded, Preempted))}


class World(Tracing):
    """One run on some hosts. The engine keeps one agent per node alive until it leaves for good."""

    def __init__(self, seed: int, *, nodes_per_replica: int = 1, tracing: bool = False) -> None:
        super().__init__(tracing=tracing)
        self._random = Random(seed)
        self.random = self._random.random
        self.agenda = Agenda()
        self.plan = self.agenda.plan
        self.nodes_per_replica = nodes_per_replica
        multiples = (nodes_per_replica, 2 * nodes_per_replica, 2 * nodes_per_replica)
        self.num_nodes = self._random.choice((2, 2, 3, 3, 3, 4, 5) if nodes_per_replica == 1 else multiples)
        self.min_nodes = self._random.choice((1, 1, self.num_nodes // 2 + 1, min(2, self.num_nodes)))
        self.max_restarts = 1000
        self.save_every = self._random.choice((3, 3, 3, 3, 50))
        self.num_steps = self._random.choice((4, 6, 9, 14)) if self.save_every == 3 else 40
        self.step_seconds = 0.3 + 0.9 * self.random()
        self.network_delay = self._random.choice((0.1, 0.1, 0.1, 0.5))
        self._num_ports = 0
        self.store = SimulatedStore(self, Record(key="k"))
        self.network = Network(self)
        self.invariants = Invariants(self)
        self.agents: list[SimulatedAgent] = []
        self._by_name: dict[str, SimulatedAgent] = {}
        self.groups: dict[int, Group] = {}
        self.dead_hosts: set[int] = set()
        self.num_hosts = self.num_nodes
        self.num_events = 0
        self.fingerprint = 0
        self.num_fenced = 0
        # What faults did, for the invariants.
        self.fired: list[Fault] = []
        self.aims: list[Fault] = []
        """Faults that wait for a node in a certain state."""
        self.struck: set[tuple[tuple[str, str], str]] = set()
        """States of nodes and faults that struck them there."""
        self.unwell_at = -1.0
        """When a link, S3 or an agent was last seen disturbed."""
        self.had_other_faults = False
        """Than of S3."""
        self.had_store_faults = False
        self.had_idle_preempted = False
        """Such a node takes with it what it has in memory."""
        self.reported: list[str] = []
        """Classes of the errors that workers were made to report."""
        self.zombies: list[float] = []
        """For how long rank 0 is to be frozen between reading a checkpoint back and naming it."""
        for number in range(self.num_nodes):
            self.plan(2.0 * self.random(), self.place, number, number)

    # ---- what the engine does ------------------------------------------------------------------------------------

    def place(self, number: int, host: int) -> None:
        """Start the agent of a node on a host, once S3 is there to tell it its job."""
        if (
            is_over(self.store.record, 0)
            or host in self.dead_hosts
            or any(agent.is_alive and agent.host == host for agent in self.agents)
        ):
            return
        if self.store.is_away_for(host):
            self.plan(1.0, self.place, number, host)
            return
        clock = Clock(self.agenda, offset=1000.0 + 5000.0 * self.random(), rate=0.9 + 0.2 * self.random())
        agent = SimulatedAgent(self, number=number, host=host, index=len(self.agents), clock=clock)
        self._by_name[agent.name] = agent
        self.agents.append(agent)
        self.trace(agent.name, f"placed on host {host}")
        self.network.dial_all()

    def process_ends(self, agent: SimulatedAgent) -> None:
        """The agent's process is gone, with its workers. The engine starts it again, unless it left for good."""
        self._gone(agent)
        for name in list(agent.links):
            self.network.close(agent, name)
        if agent.maybe_worker is not None and agent.maybe_worker.is_alive:
            agent.maybe_worker.is_alive = False
            agent.maybe_worker.group.lost(agent.maybe_worker)
        if not agent.has_left or agent.is_preempted:
            self.plan(0.5 + 2.0 * self.random(), self.place, agent.number, agent.host)

    def host_dies(self, host: int) -> None:
        """Without a word to anybody."""
        self.dead_hosts.add(host)
        for agent in self.agents:
            if agent.host == host and agent.is_alive:
                self._gone(agent)
                self.network.drop_without_a_word(agent)
                if agent.maybe_worker is not None:
                    agent.maybe_worker.is_alive = False

    def _gone(self, agent: SimulatedAgent) -> None:
        self.trace(agent.name, "is gone")
        agent.is_alive = False
        agent.maybe_memory = None
        agent.waiting.clear()

    def host_returns(self, host: int) -> None:
        self.dead_hosts.discard(host)
        number = next(agent.number for agent in self.agents if agent.host == host)
        if not any(agent.is_alive and agent.number == number for agent in self.agents):
            self.place(number, host)

    def place_elsewhere(self, number: int) -> None:
        """A replacement of a node on a new host, whatever became of the old one."""
        self.num_hosts += 1
        self.place(number, self.num_hosts - 1)

    @property
    def fewest_nodes(self) -> int:
        """That make whole replicas, and are enough."""
        return next(
            number for number in range(0, self.num_nodes + 1, self.nodes_per_replica) if number >= self.min_nodes
        )

    @property
    def can_finish(self) -> bool:
        """Enough nodes live and reach one another."""
        living = {agent.number: agent for agent in self.agents if agent.is_alive}
        return is_over(self.store.record, 0) or any(
            all(self.network.is_open(one.host, other.host) for one, other in combinations(group, 2))
            for group in combinations(living.values(), self.fewest_nodes)
        )

    @property
    def is_deserted(self) -> bool:
        """The run is over, and everybody has left."""
        return is_over(self.store.record, 0) and not any(agent.is_alive for agent in self.agents)

    # ---- what its parts ask for ----------------------------------------------------------------------------------

    def fresh_port(self) -> int:
        self._num_ports += 1
        return self._num_ports

    def by_name(self, name: str) -> SimulatedAgent:
        return self._by_name[name]

    def group_of(self, record: Record) -> Group:
        if record.token not in self.groups:
            self.groups[record.token] = Group(self, record)
        return self.groups[record.token]

    def kept_memory(self, token: int) -> set[str]:
        """Incarnations that never lost what they held in memory since they were in the group of `token`."""
        group = self.groups[token]
        return {name for name in group.workers if self._by_name[name].memory_lost_token < token}

    def count_fenced(self) -> None:
        self.num_fenced += 1

    def freeze_zombie(self, worker: Worker) -> None:
        """Rank 0, agent and all, stops with a proven checkpoint in its hands."""
        seconds = self.zombies.pop()
        self.trace(worker.agent.name, f"frozen before naming a checkpoint, for {seconds:.1f} s")
        worker.agent.was_disturbed = True
        self.freeze(worker.agent, seconds)
        self.freeze_worker(worker, seconds + self.random())

    def freeze(self, agent: SimulatedAgent, seconds: float) -> None:
        agent.frozen += 1
        agent.frozen_at = inf
        self.plan(seconds, self._thaw, agent)

    def _thaw(self, agent: SimulatedAgent) -> None:
        agent.frozen -= 1
        agent.frozen_at = self.unwell_at = self.agenda.now
        self.trace(agent.name, "wakes")
        agent.wake()
        self.network.dial_all()

    def freeze_worker(self, worker: Worker, seconds: float) -> None:
        worker.frozen += 1
        self.plan(seconds, self._thaw_worker, worker)

    def _thaw_worker(self, worker: Worker) -> None:
        worker.frozen -= 1
        worker.wake()

    # ---- telling schedules apart ---------------------------------------------------------------------------------

    def note(self, index: int, event: Event) -> None:
        """Count an event, and mix what tells it from others into the schedule's fingerprint. Ticks do not count."""
        kind = type(event)
        if kind is Tick:
            return
        self.num_events += 1
        if not (self.network.is_whole and self.store.is_well):
            self.unwell_at = self.agenda.now
        code = EVENT_CODES[kind] * 32 + index
        if isinstance(event, Heard):
            status = event.status
            code += 1024 * (status.token * 64 + status.member.node * 8 + len(status.phase) + len(status.reaches) * 4096)
        elif isinstance(event, RecordSeen) and event.maybe_record is not None:
            code += 1024 * (1 + event.maybe_record.token)
        self.fingerprint = (self.fingerprint * 1000003 ^ code) & MASK

    def look_for_aims(self, agent: SimulatedAgent) -> None:
        """Fire the faults that waited for a node in this state."""
        state = self.state_of(agent)
        for fault in list(self.aims):
            if fault.maybe_aim == state and self.agenda.now >= fault.at:
                self.aims.remove(fault)
                self.plan(0.0, fault.strike, self, agent)

    def state_of(self, agent: SimulatedAgent) -> tuple[str, str]:
        """The phase of a node, and its role in the group that the record names."""
        members: list[Any] = [member.incarnation for member in self.store.record.members]
        role = "outsider"
        if agent.name in members:
            role = "leads" if members[0] == agent.name else "member"
        return agent.node.phase, role
