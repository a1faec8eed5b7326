"""Samples by their index: rows gathered from shards, decoded by the recipe, stacked into arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from training.data.cache import ShardCache
from training.data.manifest import FieldInfo
from training.data.order import Integers
from training.data.shard import Array, Ragged, Shard
from training.errors import UserError
from training.recipe import Decode, Sample

_MASK64 = (1 << 64) - 1


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Some samples: their ids as found in the shards, and their fields, each of shape [samples, …]."""

    ids: list[str]
    fields: Mapping[str, Array]


class Reader:
    """Random access to one split of a dataset version.

    Raises `DamagedError` naming the shard: a damaged dataset never looks like a short one.
    """

    def __init__(
        self,
        cache: ShardCache,
        shard_sizes: Sequence[int],
        fields: Mapping[str, FieldInfo],
        *,
        maybe_decode: Decode | None = None,
        seed: int = 0,
    ) -> None:
        """`maybe_decode` is applied to each sample. Raises `UserError` if it is missing where fields need it."""
        ragged = [name for name, info in fields.items() if info.shape[:1] == (None,)]
        if ragged and maybe_decode is None:
            raise UserError(
                f"field {ragged[0]!r} has rows of different length: the recipe needs a decode() that gives each"
                " sample a fixed shape"
            )
        self.cache = cache
        self._starts = np.concatenate([[0], np.cumsum(shard_sizes, dtype=np.int64)])
        self._maybe_decode = maybe_decode
        self._seed = seed

    def close(self) -> None:
        self.cache.close()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, indices: Sequence[int] | Integers, *, maybe_epochs: Integers | None = None) -> Rows:
        """The samples in the order asked for. Without epochs, the recipe's `decode` leaves nothing to chance."""
        indices = np.asarray(indices, dtype=np.int64)
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"samples are numbered from 0 to {len(self) - 1}")
        numbers = np.searchsorted(self._starts, indices, side="right") - 1
        rows = indices - self._starts[numbers]
        shards = {number: self.cache.get(number) for number in np.unique(numbers).tolist()}
        places = list(zip(numbers.tolist(), rows.tolist(), strict=True))
        ids = [shards[number].id_of(row) for number, row in places]
        if self._maybe_decode is None:
            return Rows(ids=ids, fields=_gather(shards, numbers, rows))
        samples = [
            self._maybe_decode(_sample(shards[number], row), self._maybe_random(indices, maybe_epochs, k))
            for k, (number, row) in enumerate(places)
        ]
        return Rows(ids=ids, fields=_stack(samples, ids))

    def _maybe_random(self, indices: Integers, maybe_epochs: Integers | None, k: int) -> np.random.Generator | None:
        return None if maybe_epochs is None else sample_random(self._seed, int(maybe_epochs[k]), int(indices[k]))

    def read_all(self, *, batch_size: int, num_samples: int | None = None) -> Iterator[Rows]:
        """The samples in the manifest's order, the shard after the present one being fetched meanwhile."""
        stop = min(len(self), num_samples or len(self))
        for start in range(0, stop, batch_size):
            end = min(start + batch_size, stop)
            ahead = int(np.searchsorted(self._starts, end, side="right"))
            self.cache.prefetch(range(ahead, min(ahead + 1, len(self._starts) - 1)))
            yield self.read(range(start, end))


def sample_random(seed: int, epoch: int, sample: int) -> np.random.Generator:
    """The random stream of one sample in one epoch, whoever reads it (Philox; Salmon et al., SC'11)."""
    key = [seed & _MASK64, (epoch << 40 ^ sample) & _MASK64]
    return np.random.Generator(np.random.Philox(key=np.array(key, dtype=np.uint64)))


def _gather(shards: Mapping[int, Shard], numbers: Integers, rows: Integers) -> dict[str, Array]:
    """Fields of many samples with one copy per shard."""
    out: dict[str, Array] = {}
    for number, shard in shards.items():
        chosen = numbers == number
        for name, column in shard.columns.items():
            assert not isinstance(column, Ragged)
            if name not in out:
                out[name] = np.empty((len(rows), *column.shape[1:]), dtype=column.dtype)
            out[name][chosen] = column[rows[chosen]]
    return out


def _sample(shard: Shard, row: int) -> Sample:
    return {name: column[row] for name, column in shard.columns.items()}


def _stack(samples: Sequence[Sample], ids: Sequence[str]) -> dict[str, Array]:
    first = {name: (np.shape(array), np.asarray(array).dtype) for name, array in samples[0].items()}
    for sample, sample_id in zip(samples, ids, strict=True):
        found = {name: (np.shape(array), np.asarray(array).dtype) for name, array in sample.items()}
        if found != first:
            raise UserError(f"sample {sample_id}: the recipe's decode() gave {found}, where others had {first}")
    return {name: np.stack([sample[name] for sample in samples]) for name in first}
