"""All ways to share virtual workers out."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, pairwise

from training.arithmetic.balance import Shares


def all_shares(virtual_workers: int, world_size: int) -> Iterator[Shares]:
    """Each rank has one at least."""
    for cuts in combinations(range(1, virtual_workers), world_size - 1):
        yield tuple(stop - start for start, stop in pairwise((0, *cuts, virtual_workers)))
