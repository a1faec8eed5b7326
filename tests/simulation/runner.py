"""Runs schedules: one from its seed, many side by side, and the least of one that breaks an invariant."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from tests.simulation.faults import WINDOW, Fault, draw
from tests.simulation.invariants import Violation
from tests.simulation.world import World

CALM_AFTER = 2 * WINDOW + 45.0
"""By then every fault has struck and been mended."""
BOUND = 150.0
"""Within so many seconds of calm the run must be finished, and all agents gone."""


@dataclass(frozen=True, slots=True)
class Trace:
    """What one schedule gave."""

    seed: int
    faults: tuple[Fault, ...]
    num_fired: int
    num_events: int
    num_fenced: int
    num_tokens: int
    seconds: float
    fingerprint: int
    """Of the sequence of events: equal for equal schedules."""
    outcome: str
    struck: frozenset[tuple[tuple[str, str], str]]
    maybe_violation: Violation | None
    lines: list[str] = field(default_factory=list)


def nodes_per_replica(seed: int) -> int:
    """One in four schedules of five, else two, or now and then three."""
    return 1 if seed % 5 < 4 else 2 if seed % 25 < 24 else 3


def simulate(seed: int, *, maybe_faults: Sequence[Fault] | None = None, tracing: bool = False) -> Trace:
    """A pure function. With `maybe_faults`, the same world with others than its own."""
    faults = tuple(draw(Random(~seed)) if maybe_faults is None else maybe_faults)
    world = World(seed, nodes_per_replica=nodes_per_replica(seed), tracing=tracing)
    maybe_violation = None
    for fault in faults:
        fault.plan(world)
    try:
        _run(world)
    except Violation as violation:
        maybe_violation = violation
        world.trace("BROKEN", str(violation))
    record = world.store.record
    return Trace(
        seed=seed,
        faults=faults,
        num_fired=len(world.fired),
        num_events=world.num_events,
        num_fenced=world.num_fenced,
        num_tokens=record.token,
        seconds=world.agenda.now,
        fingerprint=world.fingerprint,
        outcome="result" if record.result else "failure" if record.failure else "anew" if record.generation else "none",
        struck=frozenset(world.struck),
        maybe_violation=maybe_violation,
        lines=world.lines,
    )


def _run(world: World) -> None:
    step = world.agenda.step
    while step(CALM_AFTER):
        if world.is_deserted:
            break
    else:
        world.aims.clear()
        while world.can_finish and step(CALM_AFTER + BOUND):
            if world.is_deserted:
                break
    world.invariants.on_end(can_finish=world.can_finish)


def shrink(trace: Trace, run: Callable[..., Trace] = simulate) -> Trace:
    """The same violation with as few faults as can be, each left out in turn; with the lines to read."""
    rule = trace.maybe_violation.rule if trace.maybe_violation else None
    faults = list(trace.faults)
    while True:
        for number in range(len(faults)):
            fewer = faults[:number] + faults[number + 1 :]
            found = run(trace.seed, maybe_faults=fewer)
            if found.maybe_violation is not None and found.maybe_violation.rule == rule:
                faults = fewer
                break
        else:
            return run(trace.seed, maybe_faults=faults, tracing=True)


@dataclass(slots=True)
class Summary:
    """What many schedules gave."""

    num_schedules: int = 0
    fingerprints: set[int] = field(default_factory=set)
    num_events: list[int] = field(default_factory=list)
    outcomes: dict[str, int] = field(default_factory=dict)
    struck: dict[tuple[tuple[str, str], str], int] = field(default_factory=dict)
    num_fenced: int = 0
    broken: list[tuple[int, str]] = field(default_factory=list)
    """Seeds, and what they broke."""

    def add(self, trace: Trace) -> None:
        self.num_schedules += 1
        self.fingerprints.add(trace.fingerprint)
        self.num_events.append(trace.num_events)
        self.outcomes[trace.outcome] = self.outcomes.get(trace.outcome, 0) + 1
        self.num_fenced += trace.num_fenced
        for pair in trace.struck:
            self.struck[pair] = self.struck.get(pair, 0) + 1
        if trace.maybe_violation is not None:
            self.broken.append((trace.seed, str(trace.maybe_violation)))

    def merge(self, other: Summary) -> None:
        self.num_schedules += other.num_schedules
        self.fingerprints |= other.fingerprints
        self.num_events += other.num_events
        self.num_fenced += other.num_fenced
        self.broken += other.broken
        for name, count in other.outcomes.items():
            self.outcomes[name] = self.outcomes.get(name, 0) + count
        for pair, count in other.struck.items():
            self.struck[pair] = self.struck.get(pair, 0) + count


def run_many(seeds: range) -> Summary:
    """In this process."""
    summary = Summary()
    for seed in seeds:
        summary.add(simulate(seed))
    return summary
