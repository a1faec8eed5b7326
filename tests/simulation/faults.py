"""What goes wrong: small objects with a name, drawn by the seed, each at a time or once a node is in some state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING, get_args

from training.cluster.protocol import Phase
from training.runs.record import start_fresh

if TYPE_CHECKING:
    from tests.simulation.agent import SimulatedAgent
    from tests.simulation.world import World

STATES = tuple((phase, role) for phase in get_args(Phase) for role in ("leads", "member", "outsider"))
WINDOW = 16.0
"""Faults begin within these seconds; those that wait for a state, up to as much later."""
State = tuple[str, str]
Strike = Callable[["World", "SimulatedAgent", "Fault"], None]


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong, once."""

    name: str
    at: float
    target: int
    """Which of the agents that live at that time."""
    seconds: float
    """Until it is mended, if it is of that kind."""
    choice: float
    """Decides details, from 0 to 1."""
    maybe_aim: State | None = None
    """Wait for a node in this state, which is then the target."""

    def plan(self, world: World) -> None:
        if self.maybe_aim is not None:
            world.aims.append(self)
        else:
            world.plan(self.at, self._strike_someone, world)

    def _strike_someone(self, world: World) -> None:
        living = [agent for agent in world.agents if agent.is_alive]
        if living:
            self.strike(world, living[self.target % len(living)])

    def strike(self, world: World, agent: SimulatedAgent) -> None:
        if not agent.is_alive:
            return
        if world.tracing:
            world.trace("FAULT", f"{self} strikes {agent.name}")
        world.fired.append(self)
        is_stores = self.name.startswith("S3")
        world.had_store_faults |= is_stores
        world.had_other_faults |= not is_stores
        agent.was_disturbed |= not is_stores
        touched = [other for other in world.agents if other.is_alive] if self.name in EVERYBODY else [agent]
        for other in touched:
            world.struck.add((world.state_of(other), self.name))
        STRIKES[self.name](world, agent, self)


# ---- processes and machines ------------------------------------------------------------------------------------------


def _kill_worker(world: World, agent: SimulatedAgent, fault: Fault) -> None:
    if agent.maybe_worker is not None and agent.maybe_worker.is_alive:
        agent.maybe_worker.group.kill(agent.maybe_worker)


def _kill_agent(world: World, agent: SimulatedAgent, fault: Fault) -> None:
    world.process_ends(agent)


def _lose_host(world: World, agent: SimulatedAgent, fault: Fault) -> None:
    world.host_dies(agent.host)
    world.plan(1.0 + fault.seconds, world.place_elsewhere, agent.number)


def _host_away(world: World, agent: SimulatedAgent, fault: Fault) -> None:
    world.host_dies(agent.host)
    world.plan(fault.seconds, world.host_returns, agent.host)


def _freeze_agent(world: World, agent: SimulatedAgent, fault: Fault) -> None:
    world.freeze(agent, fault.seconds)


def _freeze_worker(world: World, agent: SimulatedAgent, fault: Fault) -> None:
    if agent.maybe_worker is not None:
        world.freeze_worker(agent.maybe_worker, fault.seconds)


def _zombie(world: World, agent: SimulatedAgent, fault: Fault) -> None:
    world.zombies.append(fault.seconds)


def _hanging_stop(world: World, agent: SimulatedAgent, fault: Fault) -> None:
    agent.hangs = True


def _clock_jump(world: World, agent: SimulatedAgent, fault: Fault) -> None:
    agent.clock.jump(fault.seconds)


# ---- the network -----------------------------------------------------------------------------------------------------


def _cut_link(world: World, agent: SimulatedAgent, fault: Fault) -> None:
    """Between two nodes, one way or both."""
    others = [other.host for other in world.agents if other.is_alive and other.host != agent.host]
    if others:
        other = others[int(fault.choice * len(others))]
        both = [(agent.host, other), (other, agent.host)]
        _cut(world, both[: 1 + (fault.choice * 97 % 1 < 0.5)], fault.seconds)


def _cut_for_ever(world: World, agent: SimulatedAgent, fault: Fault) -> None:
    """The rest must do."""
    others = [other.host for other in world.agents if other.is_alive and other.host != agent.host]
    if others:
        other = others[int(fault.choice * len(others))]
        world.network.cut([(agent.host, other), (other, agent.host)])


def _cut_one_way(world: World, agent: SimulatedAgent, fault: Fault) -> None:
    """A node speaks to nobody, or hears nobody."""
    others = [host for host in range(world.num_hosts + 3) if host != agent.host]
    speaks = fault.choice < 0.5
    _cut(world, [(agent.host, other) if speaks else (other, agent.host) for other in others], fault.seconds)


def _partition(world: World, agent: SimulatedAgent, fault: Fault) -> None:
    """Two sides, S3 seen by both, or by one."""
    hosts = range(world.num_hosts + 3)
    side = {host for host in hosts if (host * 0.37 + fault.choice) % 1 < 0.5} ^ {agent.host}
    _cut(world, [(one, other) for one in hosts for other in hosts if (one in side) != (other in side)], fault.seconds)
    if fault.choice > 0.8:
        for host in side:
            _away_for(world, host, fault.seconds)


def _replaced_while_cut_off(world: World, agent: SimulatedAgent, fault: Fault) -> None:
    """The engine gives a node up that lives, and places it anew."""
    hosts = [host for host in range(world.num_hosts + 3) if host != agent.host]
    _cut(world, [(agent.host, host) for host in hosts] + [(host, agent.host) for host in hosts], fault.seconds)
    world.plan(3.0 * fault.choice, world.place_elsewhere, agent.number)


def _cut(world: World, directions: list[tuple[int, int]], seconds: float) -> None:
    world.network.cut(directions)
    world.plan(seconds, world.network.heal, directions)


# ---- S3 --------------------------------------------------------------------------------------------------------------


def _store_away(world: World, agent: SimulatedAgent, fault: Fault) -> None:
    def back() -> None:
        world.store.away -= 1

    world.store.away += 1
    world.plan(fault.seconds, back)


def _store_away_for_one(world: World, agent: SimulatedAgent, fault: Fault) -> None:
    _away_for(world, agent.host, fault.seconds)


def _away_for(world: World, host: int, seconds: float) -> None:
    world.had_store_faults = True
    world.store.away_for.append(host)
    world.plan(seconds, world.store.away_for.remove, host)


def _store_slow(world: World, agent: SimulatedAgent, fault: Fault) -> None:
    def well() -> None:
        world.store.slowness = 1.0

    world.store.slowness = 1.0 + 14.0 * fault.choice
    world.plan(fault.seconds, well)


def _lost_replies(world: World, agent: SimulatedAgent, fault: Fault) -> None:
    def well() -> None:
        world.store.losing -= 1

    world.store.losing += 1
    world.plan(fault.seconds, well)


# ---- what people, engines and recipes do -----------------------------------------------------------------------------


def _preempt(world: World, agent: SimulatedAgent, fault: Fault) -> None:
    world.had_idle_preempted |= agent.node.phase != "training" or "regroup" in agent.node._asked_workers
    agent.preempt()
    world.plan(15.0, world.invariants.on_preemption_due, agent)


def _newcomer(world: World, agent: SimulatedAgent, fault: Fault) -> None:
    """A node that was away for long comes: its agent is ended, and placed much later."""
    agent.has_left = True  # the engine has no room for it now
    world.process_ends(agent)
    world.plan(fault.seconds, world.place, agent.number, agent.host)


def _cancel(world: World, agent: SimulatedAgent, fault: Fault) -> None:
    """Somebody begins the run anew."""
    world.store.ask(-1, start_fresh, _nobody)


def _report(kind: str) -> Strike:
    def strike(world: World, agent: SimulatedAgent, fault: Fault) -> None:
        worker = agent.maybe_worker
        if worker is not None and worker.is_alive and not worker.group.is_finishing and worker.group.is_running:
            world.reported.append(kind)
            worker.group.report(worker, kind)

    return strike


def _nobody(_: object) -> None:
    pass


STRIKES: dict[str, Strike] = {
    "kill worker": _kill_worker,
    "kill agent": _kill_agent,
    "host lost": _lose_host,
    "host away": _host_away,
    "freeze agent": _freeze_agent,
    "freeze worker": _freeze_worker,
    "zombie": _zombie,
    "stop hangs": _hanging_stop,
    "clock jump": _clock_jump,
    "cut link": _cut_link,
    "cut for ever": _cut_for_ever,
    "cut one way": _cut_one_way,
    "partition": _partition,
    "replaced while cut off": _replaced_while_cut_off,
    "S3 away": _store_away,
    "S3 away for one": _store_away_for_one,
    "S3 slow": _store_slow,
    "S3 replies lost": _lost_replies,
    "preempt": _preempt,
    "newcomer": _newcomer,
    "cancel": _cancel,
    "user error": _report("UserError"),
    "exception": _report("Exception"),
}
EVERYBODY = ("S3 away", "S3 slow", "S3 replies lost", "partition", "cancel")
"""These strike all nodes alike."""
RARE = ("cancel", "user error", "exception")
"""They end most runs."""


def draw(random: Random, only: Sequence[str] = ()) -> list[Fault]:
    """One to six faults, of the kinds `only`; one kind alone in some schedules, so that pure cases come up too."""
    names = [name for name in STRIKES if name not in RARE or random.random() < 0.15]
    if only:
        names = list(only)
    elif random.random() < 0.1:
        names = [name for name in names if name.startswith("S3")]
    elif random.random() < 0.2:
        names = random.sample(names, 2)
    drawn = [_draw_one(random, names) for _ in range(random.choice((1, 1, 2, 2, 3, 3, 4, 6)))]
    if not only and random.random() < 0.02:  # begun anew in the very moment in which it is finished
        drawn = [replace(fault, maybe_aim=("done", "outsider")) for fault in drawn]
        drawn.append(replace(drawn[0], name="cancel", at=0.0, maybe_aim=("done", random.choice(("leads", "member")))))
    return drawn


def _draw_one(random: Random, names: list[str]) -> Fault:
    fault = Fault(
        name=random.choice(names),
        at=WINDOW * random.random() ** 1.3,
        target=random.randrange(60),
        seconds=random.choice((1.0, 3.0, 6.0, 12.0, 25.0)) * (0.5 + random.random()),
        choice=random.random(),
    )
    return replace(fault, maybe_aim=random.choice(STATES)) if random.random() < 0.25 else fault
