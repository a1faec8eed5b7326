"""The order of samples: one infinite sequence, a pure function of (number of samples, seed), read by one integer.

The sequence is the permutations of epoch 0, 1, 2, … joined. Each is a Feistel network over the least power of four that
holds all samples, walked along its cycle until it lands inside (Black & Rogaway, "Ciphers with Arbitrary Finite
Domains", CT-RSA 2002): any element costs O(1) time and no memory, on any machine, for ever.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NUM_ROUNDS = 6
_MASK64 = (1 << 64) - 1
Indices = NDArray[np.uint64]


def samples_at(start: int, count: int, *, num_samples: int, seed: int) -> NDArray[np.int64]:
    """Indices of the samples at positions [start, start + count) of the sequence, shape [count]."""
    positions = np.arange(start, start + count, dtype=np.int64)
    epochs = positions // num_samples
    out = np.empty(count, dtype=np.int64)
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1) if count else ():
        chosen = epochs == epoch
        out[chosen] = _permute(positions[chosen] - epoch * num_samples, num_samples, _key(seed, epoch))
    return out


def virtual_worker_range(worker: int, *, step: int, batch_size: int, virtual_workers: int) -> tuple[int, int]:
    """(start, count): the positions that virtual worker `worker` takes in step `step`, whichever rank computes it."""
    share = batch_size // virtual_workers
    return step * batch_size + worker * share, share


def _permute(positions: NDArray[np.int64], num_samples: int, key: int) -> NDArray[np.int64]:
    half_bits = max(1, ((num_samples - 1).bit_length() + 1) // 2)
    values = _feistel(positions.astype(np.uint64), half_bits, key)
    outside = values >= num_samples
    while outside.any():
        values[outside] = _feistel(values[outside], half_bits, key)
        outside = values >= num_samples
    return values.astype(np.int64)


def _feistel(values: Indices, half_bits: int, key: int) -> Indices:
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


def _mix_array(values: Indices) -> Indices:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _key(seed: int, epoch: int) -> int:
    return _mix((_mix((seed + 0x9E3779B97F4A7C15) & _MASK64) + epoch * 0xD1B54A32D192ED03) & _MASK64)
