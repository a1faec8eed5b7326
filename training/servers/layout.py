"""Which server has which parameters: contiguous ranges of fixed blocks, balanced by bytes."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from training.arithmetic.norm import BLOCK_ELEMENTS


@dataclass(frozen=True)
class Piece:
    """Elements `start` to `stop` of a flattened parameter, given by its number."""

    parameter: int
    start: int
    stop: int
    row_elements: int = 0
    """Of a table (training.arithmetic.sparse), whose pieces are of whole rows; 0 for all others."""

    @property
    def num_elements(self) -> int:
        return self.stop - self.start

    @property
    def rows(self) -> range:
        return range(self.start // self.row_elements, self.stop // self.row_elements)

    @property
    def unit_elements(self) -> int:
        """What is never cut: a block, and as many of them as have whole rows."""
        return math.lcm(BLOCK_ELEMENTS, self.row_elements or 1)


Shard = tuple[Piece, ...]


def shards(sizes: Sequence[int], num_shards: int, tables: Mapping[int, int] | None = None) -> tuple[Shard, ...]:
    """Pieces of parameters of these numbers of elements, in their order; no block is cut, so each shard is within one
    block of its fair share. A shard may be empty if there are fewer blocks than shards. `tables` are the numbers of
    those that are, and the elements of their rows, which are not cut either.

    (Range sharding: Li et al., OSDI'14, section 4.1; by bytes, not by tensors, as BytePS does, OSDI'20.)
    """
    wholes = [Piece(number, 0, size, (tables or {}).get(number, 0)) for number, size in enumerate(sizes)]
    all_blocks = [unit for whole in wholes for unit in _units(whole)]
    ends = list(accumulate(block.num_elements for block in all_blocks))
    total = ends[-1] if ends else 0
    cuts = [_nearest([0, *ends], total * shard / num_shards) for shard in range(num_shards)] + [len(all_blocks)]
    return tuple(_joined(all_blocks[begin:end]) for begin, end in pairwise(cuts))


def _units(whole: Piece) -> list[Piece]:
    starts = range(0, whole.stop, whole.unit_elements)
    return [replace(whole, start=start, stop=min(start + whole.unit_elements, whole.stop)) for start in starts]


def _nearest(ends: Sequence[int], wanted: float) -> int:
    """The number of the end that is nearest."""
    after = bisect_left(ends, wanted)
    return after if after == 0 or ends[after] - wanted <= wanted - ends[after - 1] else after - 1


def _joined(found: Sequence[Piece]) -> Shard:
    """Adjacent blocks of one parameter as one piece."""
    joined: list[Piece] = []
    for block in found:
        if joined and joined[-1].parameter == block.parameter:
            joined[-1] = replace(block, start=joined[-1].start)
        else:
            joined.append(block)
    return tuple(joined)


@dataclass(frozen=True, kw_only=True)
class Departure:
    """What of a step can go as soon as the gradients of some more parameters are there."""

    parameters: list[int]
    """No tables; the last ones first, as they come in a backward pass."""
    shards: list[int]
    """Whole with these and those before; the last ones first."""


def departures(all_shards: Sequence[Shard], num_parameters: int) -> list[Departure]:
    """Of all parameters and shards, but for tables and shards that have a part of one. The last one has the first
    shard, unless that has such a part."""
    tables = {piece.parameter for shard in all_shards for piece in shard if piece.row_elements}
    needed_by = dict.fromkeys((number for number in range(num_parameters) if number not in tables), 0)
    needed_by |= {
        piece.parameter: at for at, shard in enumerate(all_shards) for piece in shard if not piece.row_elements
    }
    whole = [at for at, shard in enumerate(all_shards) if not any(piece.row_elements for piece in shard)]
    ends = sorted({0, *needed_by.values()})
    return [
        Departure(
            parameters=[number for number in reversed(needed_by) if needed_by[number] == end],
            shards=[at for at in reversed(whole) if end == min((one for one in ends if one >= at), default=ends[-1])],
        )
        for end in reversed(ends)
    ]
