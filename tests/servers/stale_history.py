"""What shards applied and workers read, recorded, and whether the bound of staleness holds in it.

The checker knows nothing of the state machines: what a read saw is said by the parameters themselves, which are the
updates that made them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

Seen = tuple[int, ...]
"""Of each place, how many steps' updates are in a shard's parameters."""


@dataclass(frozen=True)
class Applied:
    """A shard applied a place's step, which a worker of that token sent."""

    shard: int
    place: int
    step: int
    token: int


@dataclass(frozen=True)
class HasRead:
    """A worker which has finished `step` got a shard's parameters."""

    shard: int
    place: int
    step: int
    token: int
    seen: Seen


Operation = Applied | HasRead


class StaleError(AssertionError):
    """A rule is broken."""


def check(history: Iterable[Operation], *, num_shards: int, num_places: int, bound: int, start: int = 0) -> int:
    """Raises `StaleError` for the first operation that breaks a rule. Returns the greatest lead of a worker over what
    it knew of the slowest. All began with `start` steps."""
    applied = [[start] * num_places for _ in range(num_shards)]
    tokens = [0] * num_shards
    greatest_lead = 0
    for number, operation in enumerate(history):
        own = applied[operation.shard]
        if isinstance(operation, Applied):
            _require(operation.step == own[operation.place] + 1, number, "a step is applied twice, or out of turn")
            _require(operation.token >= tokens[operation.shard], number, "an older token's step is applied")
            own[operation.place], tokens[operation.shard] = operation.step, operation.token
        else:
            _require(all(map(int.__ge__, own, operation.seen)), number, "a read saw what was not applied")
            _require(operation.seen[operation.place] >= operation.step, number, "a read lacks the reader's own step")
            lead = operation.step - min(operation.seen)
            _require(lead <= bound, number, f"a worker is {lead} steps ahead of what it reads, and {bound} are allowed")
            greatest_lead = max(greatest_lead, lead)
    return greatest_lead


def _require(condition: bool, number: int, what: str) -> None:
    if not condition:
        raise StaleError(f"operation {number}: {what}")
