"""The microbatches of the virtual workers that a rank owns, in order, made by threads ahead of their use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest

from training.data.order import Order
from training.data.reader import BLOCK_BYTES, Reader, Rows
from training.data.shard import Array

NUM_THREADS = 2
MAX_BLOCK_STEPS = 64
GROWTH = 4
"""Of each block over the one before, until they are as long as they may be."""


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """What one virtual worker reads in one step."""

    step: int
    worker: int
    ids: Sequence[str]
    """As found in the decoded records: what the ledger proves."""
    fields: Mapping[str, Array]


class Stream:
    """Microbatches of steps [step, num_steps), those of one step together, in the order of `workers`.

    Where it begins is all its state. It may be iterated once. Threads make blocks of some steps of one worker at a
    time, each while the block before it is used.
    """

    def __init__(
        self,
        reader: Reader,
        order: Order,
        *,
        workers: Sequence[int],
        step: int,
        num_steps: int,
        max_block_steps: int = MAX_BLOCK_STEPS,
    ) -> None:
        self._reader = reader
        self._order = order
        self._workers = workers
        self._steps = range(step, num_steps)
        self._share = order.batch_size // order.virtual_workers
        self._max_block_steps = max_block_steps

    def __iter__(self) -> Iterator[Microbatch]:
        pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="blocks")
        try:
            most_steps = self._block_steps() if self._steps else 1
            block = self._steps[:1]  # so that training begins soon
            waiting = self._begin(pool, block)
            while block:
                following = self._steps[block.stop - self._steps.start :][: min(most_steps, GROWTH * len(block))]
                ready, waiting = waiting, self._begin(pool, following)
                yield from self._cut(block, ready)
                block = following
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            self._reader.close()

    def _block_steps(self) -> int:
        """How many steps make a block of some megabytes, as the samples are when they are decoded."""
        first, epochs = self._order.samples(self._workers[0], step=self._steps.start)
        sample_bytes = max(self._reader.sample_bytes, self._reader.decoded_bytes(first[:1], epochs[:1]))
        half_shard = (
            self._order.num_samples // len(self._order.shard_sizes) // 2
        )  # or a block needs many shards at once
        fitting = min(BLOCK_BYTES // max(1, sample_bytes), half_shard) // self._share
        return max(1, min(self._max_block_steps, fitting))

    def _begin(self, pool: ThreadPoolExecutor, block: range) -> list[Future[Rows]]:
        """Have the block's rows made for each worker, and the shards fetched that are due by its end."""
        if not block:
            return []
        ahead = [self._order.shards_ahead(worker, step=block[-1]) for worker in self._workers]
        due = (number for numbers in zip_longest(*ahead) for number in numbers if number is not None)
        self._reader.cache.prefetch(dict.fromkeys(due))
        return [pool.submit(self._make, worker, block) for worker in self._workers]

    def _make(self, worker: int, block: range) -> Rows:
        indices, epochs = self._order.samples(worker, step=block.start, num_steps=len(block))
        return self._reader.read(indices, maybe_epochs=epochs)

    def _cut(self, block: range, ready: Sequence[Future[Rows]]) -> Iterator[Microbatch]:
        for step in block:
            start = (step - block.start) * self._share
            for worker, future in zip(self._workers, ready, strict=True):
                rows = future.result().part(start, start + self._share)
                yield Microbatch(step=step, worker=worker, ids=rows.ids, fields=rows.fields)
