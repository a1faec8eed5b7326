"""How many virtual workers each rank computes: as many as its speed says. No bit depends on who computes which.

What a step took each rank travels with the gradients, so all ranks know the same numbers, and each comes to the same
shares by itself.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from training.arithmetic.reduce import owned_range

MIN_GAIN = 1.15
"""How much longer a step must take than it would with other shares: to change them has a price, and what was measured
is never quite right."""
NUM_PARTS = 5
"""Means are taken over parts of the time, and of these the median: a moment's trouble is in one of them only."""
WORDS_PER_RANK = 2

Shares = tuple[int, ...]
"""Virtual workers of each rank. They are contiguous, in the order of ranks."""
Seconds = NDArray[np.float64]
"""What a step takes each rank, shape [ranks, 2]: beside its virtual workers, and for each of these."""


def even_shares(virtual_workers: int, world_size: int, *, multiples_of: int = 1) -> Shares:
    num_rounds = virtual_workers // multiples_of
    return tuple(multiples_of * len(owned_range(rank, world_size, num_rounds)) for rank in range(world_size))


def ranges(shares: Shares) -> tuple[range, ...]:
    """The virtual workers of each rank."""
    return tuple(range(stop - share, stop) for share, stop in zip(shares, accumulate(shares), strict=True))


def step_seconds(shares: Shares, seconds: Seconds) -> float:
    """Of the rank that the others wait for."""
    return float((seconds[:, 0] + np.array(shares) * seconds[:, 1]).max())


def quickest_shares(virtual_workers: int, seconds: Seconds) -> Shares:
    """The shares of the shortest step: each has one, and each further one goes to whoever has done it soonest."""
    shares = [1] * len(seconds)
    fixed, each = seconds.T.tolist()
    queue = [(fixed[rank] + 2 * each[rank], rank) for rank in range(len(shares))]
    heapq.heapify(queue)
    for _ in range(virtual_workers - len(shares)):
        rank = queue[0][1]
        shares[rank] += 1
        heapq.heapreplace(queue, (fixed[rank] + (shares[rank] + 1) * each[rank], rank))
    return tuple(shares)


def better_shares(shares: Shares, seconds: Seconds) -> Shares:
    """Others, if a step is so much shorter with them; even ones, if none are better."""
    candidates = even_shares(sum(shares), len(shares)), quickest_shares(sum(shares), seconds)
    best = min(candidates, key=lambda candidate: step_seconds(candidate, seconds))
    return best if step_seconds(shares, seconds) >= MIN_GAIN * step_seconds(best, seconds) else shares


@dataclass(frozen=True, kw_only=True)
class Change:
    """From one step to the next."""

    before: Shares
    shares: Shares
    seconds: Seconds


class Balance:
    """Of one group, as one of its ranks keeps it."""

    def __init__(
        self,
        virtual_workers: int,
        *,
        rank: int,
        world_size: int,
        over_seconds: float,
        num_computing: int | None = None,
        multiples_of: int = 1,
    ) -> None:
        """The first `num_computing` ranks (None: all) have virtual workers. Shares are even at first, and stay so if
        `over_seconds` is 0; else these are how long it looks before it changes them. At first they are `multiples_of`
        that. What is called a rank here is a replica, where several ranks compute the same virtual workers."""
        self.num_computing = world_size if num_computing is None else num_computing
        self._others = (0,) * (world_size - self.num_computing)
        self._shares = even_shares(virtual_workers, self.num_computing, multiples_of=multiples_of)
        self._rank = rank
        self._part_seconds = over_seconds / NUM_PARTS
        self.num_words = WORDS_PER_RANK * self.num_computing if over_seconds > 0 and self.num_computing > 1 else 0
        self._forget()

    @property
    def shares(self) -> Shares:
        """Of all ranks."""
        return self._shares + self._others

    @property
    def _computes(self) -> bool:
        return self._rank < self.num_computing

    def _forget(self) -> None:
        self._own = (0.0, 0.0)
        self._parts: deque[Seconds] = deque(maxlen=NUM_PARTS)
        self._begin_part()

    def _begin_part(self) -> None:
        self._sum = np.zeros((self.num_computing, WORDS_PER_RANK))
        self._num_steps = 0
        self._seconds = 0.0

    def seconds_at_even_shares(self, fixed_seconds: float, workers_seconds: float) -> float:
        """What a step would take this rank if all that compute had the same number of virtual workers: it took so long
        beside its own, and for all of these."""
        if not self._computes:
            return fixed_seconds
        return fixed_seconds + workers_seconds * sum(self._shares) / (self._shares[self._rank] * self.num_computing)

    def note(self, fixed_seconds: float, workers_seconds: float) -> None:
        """What the last step took this rank without waiting: beside its virtual workers, and for all of these."""
        if self._computes:
            self._own = (fixed_seconds, workers_seconds / self._shares[self._rank])

    def words(self) -> list[float]:
        """What this rank says in the next step; others say 0 in its place, so the sum over all is exact."""
        said = [0.0] * self.num_words
        if self.num_words and self._computes:
            said[WORDS_PER_RANK * self._rank : WORDS_PER_RANK * (self._rank + 1)] = self._own
        return said

    def hear(self, words: Sequence[float]) -> None:
        """The sum of what all ranks said in a step: nothing, in the first one with these shares. Of a step that a group
        of another size summed up, nothing is heard."""
        if len(words) != self.num_words:
            return
        heard = np.array(words, np.float64).reshape(-1, WORDS_PER_RANK)
        if not len(heard) or not heard[:, 1].all():
            return
        self._sum += heard
        self._num_steps += 1
        self._seconds += step_seconds(self._shares, heard)
        if self._seconds >= self._part_seconds:
            self._parts.append(self._sum / self._num_steps)
            self._begin_part()

    def maybe_change(self) -> Change | None:
        """What the shares are from now on, if it is worth it: the same on all ranks that heard the same."""
        if len(self._parts) < NUM_PARTS or self._num_steps:  # or nothing new since the last look
            return None
        seconds = np.median(np.stack(self._parts), axis=0)
        before, found = self.shares, better_shares(self._shares, seconds)
        if found == self._shares:
            return None
        self._shares = found
        self._forget()
        return Change(before=before, shares=self.shares, seconds=seconds)
