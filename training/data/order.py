"""The order of samples: one infinite sequence, pure arithmetic, read by one integer.

The sequence is the permutations of epoch 0, 1, 2, … joined; step s takes the elements [s·B, (s+1)·B), of which virtual
worker v takes the v-th part: so no element depends on how many ranks there are, and a batch may cross an epoch.

Within an epoch the shards are shuffled and dealt out: each virtual worker reads a run of shards of its own, and
shuffles the samples inside windows of `window_shards` of them. So every rank fetches only its own part of the dataset,
a batch mixes `virtual_workers` x `window_shards` shards, and all of it is computed in O(shards) memory. A dataset that
fits into so many shards is shuffled whole. docs/data.md measures what the windows cost.

Permutations are Feistel networks walked along their cycles until they land inside (Black & Rogaway, "Ciphers with
Arbitrary Finite Domains", CT-RSA 2002): any element costs O(1) time and no memory, on any machine, for ever.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

NUM_ROUNDS = 6
NUM_EPOCHS_KEPT = 3
_MASK64 = (1 << 64) - 1
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Order:
    """Which sample every virtual worker reads at every step.

    `shard_sizes` are the samples of each shard, in the manifest's order; indices count samples in that order.
    """

    shard_sizes: tuple[int, ...]
    seed: int
    batch_size: int
    virtual_workers: int
    window_shards: int

    @cached_property
    def num_samples(self) -> int:
        return sum(self.shard_sizes)

    @property
    def is_whole(self) -> bool:
        """Whether all shards fit into the windows of a batch, so that each epoch is one permutation of all samples."""
        return len(self.shard_sizes) <= self.virtual_workers * self.window_shards

    @cached_property
    def starts(self) -> Integers:
        """Index of each shard's first sample, and their number at the end, shape [shards + 1]."""
        return np.concatenate([[0], np.cumsum(self.shard_sizes, dtype=np.int64)])

    def samples(self, worker: int, *, step: int, num_steps: int = 1) -> tuple[Integers, Integers]:
        """(indices, epochs) of what virtual worker `worker` reads in steps [step, step + num_steps), one after another.

        Shape [num_steps x batch_size / virtual_workers] each.
        """
        share = self.batch_size // self.virtual_workers
        local = np.arange(step * share, (step + num_steps) * share, dtype=np.int64)
        positions = (local // share) * self.batch_size + worker * share + local % share
        epochs = positions // self.num_samples
        out = np.empty(len(positions), dtype=np.int64)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            chosen = epochs == epoch
            if self.is_whole:
                offsets = positions[chosen] - epoch * self.num_samples
                out[chosen] = permute(offsets, self.num_samples, _key(self.seed, epoch))
            else:
                out[chosen] = self._epoch(epoch).samples(worker, local[chosen])
        return out, epochs

    def batch(self, step: int) -> Integers:
        """Indices of a whole step's samples, in order of virtual workers, shape [batch_size]."""
        return np.concatenate([self.samples(worker, step=step)[0] for worker in range(self.virtual_workers)])

    def shards_of(self, indices: Integers) -> tuple[Integers, Integers]:
        """(shard numbers, rows within them) of samples."""
        shards = np.searchsorted(self.starts, indices, side="right") - 1
        return shards, indices - self.starts[shards]

    def shards_ahead(self, worker: int, *, step: int) -> list[int]:
        """The shards of the window that `worker` reads from at `step`, and those due by then of the one after it.

        The next window's shards fall due one by one as this window is read, so that fetching them is spread evenly.
        """
        share = self.batch_size // self.virtual_workers
        position = step * self.batch_size + worker * share
        epoch = position // self.num_samples
        if self.is_whole:
            return list(range(len(self.shard_sizes)))
        return self._epoch(epoch).shards_ahead(worker, step * share)

    def _epoch(self, epoch: int) -> _Epoch:
        epochs: dict[int, _Epoch] = self.__dict__.setdefault("_epochs", {})
        if epoch not in epochs:
            while len(epochs) >= NUM_EPOCHS_KEPT:
                del epochs[min(epochs)]
            epochs[epoch] = _Epoch(self, epoch)
        return epochs[epoch]


class _Epoch:
    """One epoch of a dataset in many shards."""

    def __init__(self, order: Order, epoch: int) -> None:
        self._order = order
        self._epoch = epoch
        num_shards = len(order.shard_sizes)
        self._shards = permute(np.arange(num_shards, dtype=np.int64), num_shards, _key(order.seed, epoch))
        sizes = np.asarray(order.shard_sizes, dtype=np.int64)[self._shards]
        self._ends = np.cumsum(sizes)
        self._starts = self._ends - sizes
        workers = np.arange(order.virtual_workers, dtype=np.int64)
        self._first_local = self._num_before(workers, epoch * order.num_samples)
        lengths = self._num_before(workers, (epoch + 1) * order.num_samples) - self._first_local
        self._lane_ends = np.cumsum(lengths)
        self._lane_starts = self._lane_ends - lengths

    def _num_before(self, workers: Integers, position: int) -> Integers:
        """How many elements of the sequence before `position` each worker takes."""
        share = self._order.batch_size // self._order.virtual_workers
        steps, rest = divmod(position, self._order.batch_size)
        return steps * share + np.clip(rest - workers * share, 0, share)

    def samples(self, worker: int, local: Integers) -> Integers:
        """Indices of the worker's own elements number `local` (counted over all epochs)."""
        offsets = self._lane_starts[worker] + local - self._first_local[worker]
        windows = self._window_of(worker, offsets)
        out = np.empty(len(offsets), dtype=np.int64)
        for window in np.unique(windows):
            chosen = windows == window
            low, high = self._bounds(worker, int(window))
            key = _mix((_key(self._order.seed, self._epoch) + worker * 0xD1B54A32D192ED03 + int(window) + 1) & _MASK64)
            out[chosen] = low + permute(offsets[chosen] - low, high - low, key)
        ranks = np.searchsorted(self._ends, out, side="right")
        return self._order.starts[self._shards[ranks]] + out - self._starts[ranks]

    def shards_ahead(self, worker: int, local: int) -> list[int]:
        offset = int(self._lane_starts[worker] + local - self._first_local[worker])
        window = int(self._window_of(worker, np.array([offset]))[0])
        low, high = self._bounds(worker, window)
        first = self._first_rank(worker) + window * self._order.window_shards
        num_due = self._order.window_shards * (offset - low + 1) // (high - low)
        last = int(np.searchsorted(self._ends, self._lane_ends[worker] - 1, side="right"))
        return [int(n) for n in self._shards[first : min(first + self._order.window_shards + num_due, last + 1)]]

    def _first_rank(self, worker: int) -> int:
        """Where the worker's run of shards begins in the shuffled list."""
        return int(np.searchsorted(self._ends, self._lane_starts[worker], side="right"))

    def _window_of(self, worker: int, offsets: Integers) -> Integers:
        ranks = np.searchsorted(self._ends, offsets, side="right")
        return (ranks - self._first_rank(worker)) // self._order.window_shards

    def _bounds(self, worker: int, window: int) -> tuple[int, int]:
        """Offsets [low, high) of a window: whole shards, but for the worker's first and last one."""
        first = self._first_rank(worker) + window * self._order.window_shards
        last = min(first + self._order.window_shards, len(self._ends)) - 1
        low = max(int(self._starts[first]), int(self._lane_starts[worker]))
        return low, min(int(self._ends[last]), int(self._lane_ends[worker]))


def permute(positions: Integers, length: int, key: int) -> Integers:
    """Where a keyed permutation of [0, length) takes each of `positions`."""
    half_bits = max(1, ((length - 1).bit_length() + 1) // 2)
    values = _feistel(positions.astype(np.uint64), half_bits, key)
    outside = values >= length
    while outside.any():
        values[outside] = _feistel(values[outside], half_bits, key)
        outside = values >= length
    return values.astype(np.int64)


def _feistel(values: NDArray[np.uint64], half_bits: int, key: int) -> NDArray[np.uint64]:
    mask = np.uint64((1 << half_bits) - 1)
    shift = np.uint64(half_bits)
    left, right = values >> shift, values & mask
    for number in range(NUM_ROUNDS):
        round_key = np.uint64(_mix(key + number * 0x9E3779B97F4A7C15))
        left, right = right, left ^ (_mix_array(right ^ round_key) & mask)
    return (left << shift) | right


def _mix(value: int) -> int:
    """The finaliser of SplitMix64 (Steele et al., OOPSLA 2014)."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def _mix_array(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _key(seed: int, epoch: int) -> int:
    return _mix((_mix((seed + 0x9E3779B97F4A7C15) & _MASK64) + epoch * 0xD1B54A32D192ED03) & _MASK64)
