"""Which server has which parameters: contiguous ranges of fixed blocks, balanced by bytes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from training.arithmetic.norm import blocks


@dataclass(frozen=True)
class Piece:
    """Elements `start` to `stop` of a flattened parameter, given by its number."""

    parameter: int
    start: int
    stop: int

    @property
    def num_elements(self) -> int:
        return self.stop - self.start


Shard = tuple[Piece, ...]


def shards(sizes: Sequence[int], num_shards: int) -> tuple[Shard, ...]:
    """Pieces of parameters of these numbers of elements, in their order; no block is cut, so each shard is within one
    block of its fair share. A shard may be empty if there are fewer blocks than shards.

    (Range sharding: Li et al., OSDI'14, section 4.1; by bytes, not by tensors, as BytePS does, OSDI'20.)
    """
    all_blocks = [Piece(number, block.start, block.stop) for number, size in enumerate(sizes) for block in blocks(size)]
    ends = list(accumulate(block.num_elements for block in all_blocks))
    total = ends[-1] if ends else 0
    cuts = [_nearest([0, *ends], total * shard / num_shards) for shard in range(num_shards)] + [len(all_blocks)]
    return tuple(_joined(all_blocks[begin:end]) for begin, end in pairwise(cuts))


def _nearest(ends: Sequence[int], wanted: float) -> int:
    """The number of the end that is nearest."""
    after = bisect_left(ends, wanted)
    return after if after == 0 or ends[after] - wanted <= wanted - ends[after - 1] else after - 1


def _joined(found: Sequence[Piece]) -> Shard:
    """Adjacent blocks of one parameter as one piece."""
    joined: list[Piece] = []
    for block in found:
        if joined and joined[-1].parameter == block.parameter:
            joined[-1] = Piece(block.parameter, joined[-1].start, block.stop)
        else:
            joined.append(block)
    return tuple(joined)
