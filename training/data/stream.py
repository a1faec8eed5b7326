"""The microbatches of the virtual workers that a rank owns, in order, made by threads ahead of their use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from training.data.order import Order
from training.data.reader import BLOCK_BYTES, Reader, Rows
from training.data.shard import Array

NUM_THREADS = 2
MAX_BLOCK_STEPS = 64


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
        half_shard = order.num_samples // len(order.shard_sizes) // 2  # or a block would need many shards at once
        fitting = min(BLOCK_BYTES // max(1, reader.sample_bytes), half_shard) // self._share
        self._block_steps = max(1, min(max_block_steps, fitting))

    def __iter__(self) -> Iterator[Microbatch]:
        pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="blocks")
        try:
            blocks = [self._steps[i : i + self._block_steps] for i in range(0, len(self._steps), self._block_steps)]
            waiting = self._begin(pool, blocks[0]) if blocks else []
            for number, block in enumerate(blocks):
                ready, waiting = waiting, self._begin(pool, blocks[number + 1]) if number + 1 < len(blocks) else []
                yield from self._cut(block, ready)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            self._reader.close()

    def _begin(self, pool: ThreadPoolExecutor, block: range) -> list[Future[Rows]]:
        """Have the block's rows made for each worker, and the shards fetched that are due by its end."""
        for worker in self._workers:
            self._reader.cache.prefetch(self._order.shards_ahead(worker, step=block[-1]))
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
