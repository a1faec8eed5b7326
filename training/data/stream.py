"""The microbatches of the virtual workers that a rank owns, in order, made by threads ahead of their use."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

from training.data.order import Integers, Order
from training.data.reader import Reader
from training.data.shard import Array

NUM_THREADS = 2
BLOCK_STEPS = 64
"""The order is computed for so many steps at once."""


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """What one virtual worker reads in one step."""

    step: int
    worker: int
    ids: list[str]
    """As found in the decoded records: what the ledger proves."""
    fields: Mapping[str, Array]


class Stream:
    """Microbatches of steps [step, num_steps), those of one step together, in the order of `workers`.

    Where it begins is all its state. It may be iterated once.
    """

    def __init__(
        self, reader: Reader, order: Order, *, workers: Sequence[int], step: int, num_steps: int, num_ahead: int = 16
    ) -> None:
        self._reader = reader
        self._order = order
        self._workers = workers
        self._steps = range(step, num_steps)
        self._num_ahead = num_ahead
        self._blocks: dict[tuple[int, int], tuple[Integers, Integers]] = {}

    def __iter__(self) -> Iterator[Microbatch]:
        pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="microbatches")
        try:
            places = ((step, worker) for step in self._steps for worker in self._workers)
            waiting: deque[Future[Microbatch]] = deque(
                self._begin(pool, *place) for place in islice(places, self._num_ahead)
            )
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(self._begin(pool, *place) for place in islice(places, 1))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            self._reader.close()

    def _begin(self, pool: ThreadPoolExecutor, step: int, worker: int) -> Future[Microbatch]:
        self._reader.cache.prefetch(self._order.shards_ahead(worker, step=step))
        indices, epochs = self._samples(step, worker)
        return pool.submit(self._make, step, worker, indices, epochs)

    def _make(self, step: int, worker: int, indices: Integers, epochs: Integers) -> Microbatch:
        rows = self._reader.read(indices, maybe_epochs=epochs)
        return Microbatch(step=step, worker=worker, ids=rows.ids, fields=rows.fields)

    def _samples(self, step: int, worker: int) -> tuple[Integers, Integers]:
        block, offset = divmod(step, BLOCK_STEPS)
        if (block, worker) not in self._blocks:
            self._blocks = {key: value for key, value in self._blocks.items() if key[0] >= block}
            self._blocks[block, worker] = self._order.samples(worker, step=block * BLOCK_STEPS, num_steps=BLOCK_STEPS)
        share = self._order.batch_size // self._order.virtual_workers
        here = slice(offset * share, (offset + 1) * share)
        indices, epochs = self._blocks[block, worker]
        return indices[here], epochs[here]
