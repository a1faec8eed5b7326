"""A discrete-event simulation of one run: every second of the wall time is booked to exactly one part.

Time is counted in whole nanoseconds, so the parts add up without rounding. Between two failures nothing is random,
so a run's cost is its number of failures, whatever the number of nodes or steps.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np

from benchmarks.recovery.model import Parameters, Policy, Replacement

NANOSECONDS = 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One node stops at a time."""

    nanoseconds: int
    node: int
    luck: float
    """In [0, 1): below `all_copies_lost_probability`, the failure takes all copies of the state."""


def poisson_failures(p: Parameters, *, horizon_seconds: float, seed: int) -> list[Failure]:
    """Independent exponential lifetimes of all nodes. One seed gives the same sequence, stretched, for any MTBF."""
    mean = p.failures_per_second * horizon_seconds
    count = int(mean + 10 * mean**0.5 + 50)  # ten standard deviations: never too few in practice
    times, nodes, luck = (np.random.default_rng([seed, stream]) for stream in range(3))
    seconds = np.cumsum(times.standard_exponential(count)) / p.failures_per_second
    columns = (
        seconds[seconds < horizon_seconds].tolist(),
        (nodes.random(count) * p.num_nodes).tolist(),
        luck.random(count),
    )
    return [
        Failure(nanoseconds=_nanoseconds(second), node=int(node), luck=float(chance))
        for second, node, chance in zip(*columns, strict=False)
    ]


def periodic_failures(
    p: Parameters, *, every_seconds: float, num_failures: int, jitter_seconds: float = 0.0, seed: int = 0
) -> list[Failure]:
    """One node after the other, in the middle of each period and a random bit later: a bench that kills by the clock.

    The jitter is for the step that breaks: by the clock alone, it would be broken at the same place every time.
    """
    jitter = np.random.default_rng(seed).random(num_failures) * jitter_seconds
    seconds = ((np.arange(num_failures) + 0.5) * every_seconds + jitter).tolist()
    return [
        Failure(nanoseconds=_nanoseconds(second), node=n % p.num_nodes, luck=1.0) for n, second in enumerate(seconds)
    ]


@dataclass(kw_only=True)
class Breakdown:
    """Where the wall time went, in nanoseconds."""

    productive: int = 0
    """Work that counts in the end, at full speed."""
    checkpoint: int = 0
    detection: int = 0
    waiting: int = 0
    """For a replacement."""
    regroup: int = 0
    transfer: int = 0
    """Of the state to replacements, or of the last checkpoint to all."""
    redone: int = 0
    """Work that was lost and had to be done again."""
    missing: int = 0
    """What running without the missing nodes took longer."""
    num_failures: int = 0
    num_reloads: int = 0
    """Failures after which the last checkpoint was loaded."""

    def seconds(self) -> dict[str, float]:
        """By part."""
        return {name: count / NANOSECONDS for name, count in self.parts().items()}

    def parts(self) -> dict[str, int]:
        return {field.name: getattr(self, field.name) for field in fields(self) if not field.name.startswith("num_")}

    @property
    def wall(self) -> int:
        return sum(self.parts().values())

    @property
    def goodput(self) -> float:
        return self.productive / self.wall

    def add(self, part: str, nanoseconds: int) -> None:
        setattr(self, part, getattr(self, part) + nanoseconds)


def simulate(
    p: Parameters, *, horizon_seconds: float, seed: int = 0, failures: Iterable[Failure] | None = None
) -> Breakdown:
    """One run of so many seconds; by default with Poisson failures of this seed."""
    if failures is None:
        failures = poisson_failures(p, horizon_seconds=horizon_seconds, seed=seed)
    return _Run(p, list(failures), _nanoseconds(horizon_seconds)).to_the_end()


def _nanoseconds(seconds: float) -> int:
    return round(seconds * NANOSECONDS)


class _Run:
    """The state of a simulated run; all times in nanoseconds."""

    def __init__(self, p: Parameters, failures: list[Failure], end: int) -> None:
        self.p, self.failures, self.end = p, failures, end
        self.done = Breakdown()
        self.now = 0
        self.next_failure = 0
        self.step = max(1, _nanoseconds(p.step_seconds))
        self.interval = self.step * p.steps_per_checkpoint
        self.stall = _nanoseconds(p.checkpoint_stall_seconds)
        self.work = 0  # since the last checkpoint, at full speed
        self.stalled = 0  # of the checkpoint being written
        self.ready: dict[int, int] = {}  # when the replacement of each missing node stands ready
        self.uncovered: set[int] = set()  # nodes whose copy of the state is lost and not yet restored

    def to_the_end(self) -> Breakdown:
        while self.now < self.end:
            broken = self._train(min(self.ready.values(), default=self.end))
            if broken or self.now < self.end:
                self._recover(broken)
        return self.done

    def _train(self, until: int) -> Failure | None:
        """Steps and checkpoints until then or the next failure."""
        begin = self.now
        broken = self._pass(until)
        self._book_training(self.now - begin)
        return broken

    def _book_training(self, elapsed: int) -> None:
        """Work and stalls take turns; with nodes missing, `above` parts of the work take the time of `below`."""
        above, below = self.p.speed(len(self.ready))
        interval = -(-self.interval * below // above)
        cycles, within = divmod(-(-self.work * below // above) + self.stalled + elapsed, interval + self.stall)
        work, stalled = min(within, interval) * above // below, max(0, within - interval)
        productive = cycles * self.interval + work - self.work
        checkpoint = cycles * self.stall + stalled - self.stalled
        self.done.productive += productive
        self.done.checkpoint += checkpoint
        self.done.missing += elapsed - productive - checkpoint
        self.work, self.stalled = work, stalled

    def _pass(self, until: int) -> Failure | None:
        """To then, to the end or to the next failure, which is returned. A node that is missing cannot fail."""
        until = min(until, self.end)
        while self.next_failure < len(self.failures) and self.failures[self.next_failure].nanoseconds < until:
            failure = self.failures[self.next_failure]
            self.next_failure += 1
            if failure.node not in self.ready:
                self.now = max(self.now, failure.nanoseconds)
                return failure
        self.now = max(self.now, until)
        return None

    def _recover(self, broken: Failure | None) -> None:
        """After a failure, or because replacements stand ready. A failure meanwhile begins it anew."""
        detect = reload = False
        while self.now < self.end:
            if broken:
                detect, reload = True, self._lose(broken) or reload
            broken = self._attempt(detect, reload)
            if not broken:
                return

    def _lose(self, broken: Failure) -> bool:
        """The node and the work that goes with it; true if the state can only come from a checkpoint."""
        p = self.p
        self.ready[broken.node] = self.now + _nanoseconds(p.detection_seconds + p.replacement_seconds)
        self.uncovered.add(broken.node)
        reload = p.policy is Policy.RESTART or broken.luck < p.all_copies_lost_probability
        reload = reload or self._all_copies_lost(broken.node)
        lost = self.work if reload else self.work % self.step
        self.work -= lost
        self.stalled = 0
        self.done.productive -= lost
        self.done.redone += lost
        self.done.num_failures += 1
        self.done.num_reloads += reload
        return reload

    def _all_copies_lost(self, node: int) -> bool:
        num_groups = self.p.num_nodes // self.p.num_copies
        if len(self.uncovered) < self.p.num_copies:
            return False
        return all(other in self.uncovered for other in range(node % num_groups, self.p.num_nodes, num_groups))

    def _attempt(self, detect: bool, reload: bool) -> Failure | None:
        """One recovery: the failure that broke it, or None if training can go on (or the end was reached)."""
        p = self.p
        broken = self._spend("detection", _nanoseconds(p.detection_seconds) if detect else 0)
        broken = broken or self._spend("waiting", self._wait())
        joining = [node for node, ready in self.ready.items() if ready <= self.now]
        broken = broken or self._spend("regroup", _nanoseconds(p.group_seconds))
        transfer = p.checkpoint_load_seconds if reload else p.transfer_seconds if joining else 0.0
        broken = broken or self._spend("transfer", _nanoseconds(transfer))
        if not broken:
            self.uncovered.difference_update(self.uncovered if reload else joining)
            self.ready = {node: ready for node, ready in self.ready.items() if node not in joining}
        return broken

    def _wait(self) -> int:
        """Until all replacements stand ready, or the first if the rest can go on and there is a rest."""
        if self.p.replacement is Replacement.SPARE:
            return max(0, max(self.ready.values(), default=0) - self.now)
        return max(0, min(self.ready.values()) - self.now) if len(self.ready) == self.p.num_nodes else 0

    def _spend(self, part: str, nanoseconds: int) -> Failure | None:
        begin = self.now
        broken = self._pass(begin + nanoseconds)
        self.done.add(part, self.now - begin)
        return broken
