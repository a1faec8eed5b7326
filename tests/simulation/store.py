"""The run record on a simulated S3: a compare-and-set at one moment, and answers that come late or never."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from training.errors import FencedError
from training.runs.record import Record

if TYPE_CHECKING:
    from tests.simulation.world import World

Change = Callable[[Record], Record]
Reply = Callable[[Record | None], None]
"""With the newest record; None if the store is away."""


def unchanged(record: Record) -> Record:
    return record


class SimulatedStore:
    __slots__ = ("_world", "away", "away_for", "losing", "record", "slowness")

    def __init__(self, world: World, record: Record) -> None:
        self._world = world
        self.record = record
        self.away = 0
        """How many faults keep it away from all."""
        self.away_for: list[int] = []
        """From these hosts."""
        self.slowness = 1.0
        self.losing = 0
        """How many faults make answers go astray."""

    @property
    def is_well(self) -> bool:
        return not (self.away or self.away_for or self.losing or self.slowness > 1)

    def is_away_for(self, host: int) -> bool:
        return self.away > 0 or host in self.away_for

    def ask(self, host: int, change: Change, reply: Reply, *, token: int | None = None, on_fence: Reply = id) -> None:  # type: ignore[assignment]
        """Apply `change` some time later, and say so later still. `token` is that of the group that asks, if it is one.

        A request that was sent is applied even if its sender dies.
        """
        world = self._world
        delay = (0.01 + 0.15 * world.random()) * self.slowness
        if self.is_away_for(host):
            world.plan(0.2 + world.random(), reply, None)
        elif self.losing and change is not unchanged and world.random() < 0.5:
            # The answer is lost; what was asked for happens before the sender gives up, or after.
            world.plan(0.2 + world.random(), reply, None)
            world.plan(1.5 * world.random(), self._apply, host, change, _nobody, token, _nobody)
        else:
            world.plan(delay, self._apply, host, change, reply, token, on_fence)

    def _apply(self, host: int, change: Change, reply: Reply, token: int | None, on_fence: Reply) -> None:
        world = self._world
        delay = (0.01 + 0.05 * world.random()) * self.slowness
        if self.is_away_for(host):
            world.plan(delay, reply, None)
            return
        before = self.record
        try:
            after = change(before)
        except FencedError:
            world.plan(delay, on_fence, before)
            return
        if after != before:
            world.invariants.on_record(before, after, token)
            self.record = after
            if world.tracing:
                world.trace("S3", f"token {after.token}: {world.describe_change(before, after)}")
        world.plan(delay, reply, after)


def _nobody(maybe_record: Record | None) -> None:
    """The one who asked has given up."""
