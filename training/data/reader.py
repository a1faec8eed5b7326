"""Samples by their index: rows gathered from shards, decoded by the recipe, stacked into arrays."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from training.data.cache import ShardCache
from training.data.manifest import FieldInfo
from training.data.order import Integers
from training.data.shard import Array, Column, Ragged, Shard
from training.data.withdrawn import record_of
from training.errors import DeterministicError, UnbrokenError, UserError
from training.recipe import Decode, Sample

NUM_SHARDS_AHEAD = 6
LARGE_ROW_BYTES = 2048
NUM_LOOKS = 3  # a retry of the store's client draws from Python's generator too, but not each time
BLOCK_BYTES = 2 << 20
_MASK64 = (1 << 64) - 1


class LazyIds(Sequence[str]):
    """Ids that are decoded when somebody looks: to decode them takes longer than to copy small samples."""

    def __init__(self, shards: Mapping[int, Shard], numbers: Integers, rows: Integers) -> None:
        self._shards = shards
        self._numbers = numbers
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> LazyIds: ...

    def __getitem__(self, index: int | slice) -> str | LazyIds:
        if isinstance(index, slice):
            return LazyIds(self._shards, self._numbers[index], self._rows[index])
        return self._shards[int(self._numbers[index])].id_of(int(self._rows[index]))

    def __iter__(self) -> Iterator[str]:
        for number, row in zip(self._numbers.tolist(), self._rows.tolist(), strict=True):
            yield self._shards[number].id_of(row)

    def __reduce__(self) -> tuple[type[list[str]], tuple[list[str]]]:
        """To another process they go without their shards."""
        return list, (list(self),)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Some samples: their ids as found in the shards, and their fields, each of shape [samples, …]."""

    ids: Sequence[str]
    fields: Mapping[str, Array]

    def part(self, start: int, stop: int) -> Rows:
        """Some of them, without a copy."""
        return Rows(ids=self.ids[start:stop], fields={name: field[start:stop] for name, field in self.fields.items()})


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
        self.sample_bytes = sum(_declared_bytes(info) for info in fields.values())
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
        shards, numbers, rows = self._find(indices)
        ids = LazyIds(shards, numbers, rows)
        if self._maybe_decode is None:
            return Rows(ids=ids, fields=_gather(shards, numbers, rows))
        samples = [
            _decoded(
                self._maybe_decode, ids[k], _sample(shards[number], row), self._maybe_random(indices, maybe_epochs, k)
            )
            for k, (number, row) in enumerate(zip(numbers.tolist(), rows.tolist(), strict=True))
        ]
        return Rows(ids=ids, fields=_stack(samples, ids))

    def ids(self, indices: Integers) -> Sequence[str]:
        """Those of samples that nobody decodes."""
        return LazyIds(*self._find(indices))

    def _find(self, indices: Integers) -> tuple[Mapping[int, Shard], Integers, Integers]:
        """The shards that samples lie in; for each sample the shard's number, and the row."""
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"samples are numbered from 0 to {len(self) - 1}")
        numbers = np.searchsorted(self._starts, indices, side="right") - 1
        rows = indices - self._starts[numbers]
        return {number: self.cache.get(number) for number in np.unique(numbers).tolist()}, numbers, rows

    def decoded_bytes(self, indices: Integers, epochs: Integers) -> int:
        """How large a sample is when the recipe has decoded it; 0 if it decodes nothing.

        Raises `DeterministicError` if `decode` draws from a global random generator: threads share those.
        """
        if self._maybe_decode is None:
            return 0
        self.read(indices, maybe_epochs=epochs)  # the shards are there from now on
        if all(_changes_global_randomness(lambda: self.read(indices, maybe_epochs=epochs)) for _ in range(NUM_LOOKS)):
            raise DeterministicError(
                "the recipe's decode() draws from a global random generator, which gives other samples each time: use"
                " the `random` that it is given"
            )
        fields = self.read(indices, maybe_epochs=epochs).fields
        return sum(array.nbytes for array in fields.values()) // max(1, len(indices))

    def _maybe_random(self, indices: Integers, maybe_epochs: Integers | None, k: int) -> np.random.Generator | None:
        return None if maybe_epochs is None else sample_random(self._seed, int(maybe_epochs[k]), int(indices[k]))

    def read_all(self, *, batch_size: int, first: int = 0, num_samples: int | None = None) -> Iterator[Rows]:
        """The samples in the manifest's order from number `first` on, the next shards being fetched meanwhile."""
        stop = len(self) if num_samples is None else min(len(self), first + num_samples)
        block = batch_size * max(1, BLOCK_BYTES // (batch_size * max(1, self.sample_bytes)))
        for start in range(first, stop, block):
            end = min(start + block, stop)
            head = int(np.searchsorted(self._starts, start, side="right")) - 1
            last = int(np.searchsorted(self._starts, end - 1, side="right")) - 1
            self.cache.prefetch(range(head, min(last + NUM_SHARDS_AHEAD, len(self._starts) - 2) + 1))
            rows = self.read(np.arange(start, end))
            for offset in range(0, end - start, batch_size):
                yield rows.part(offset, min(offset + batch_size, end - start))


def _declared_bytes(info: FieldInfo) -> int:
    """Of one row; a length that differs from sample to sample counts as a thousand."""
    return int(np.dtype(info.dtype).itemsize * np.prod([1000 if n is None else n for n in info.shape], dtype=np.int64))


def sample_random(seed: int, epoch: int, sample: int) -> np.random.Generator:
    """The random stream of one sample in one epoch, whoever reads it (Philox; Salmon et al., SC'11)."""
    key = [seed & _MASK64, (epoch << 40 ^ sample) & _MASK64]
    return np.random.Generator(np.random.Philox(key=np.array(key, dtype=np.uint64)))


def _gather(shards: Mapping[int, Shard], numbers: Integers, rows: Integers) -> dict[str, Array]:
    """Fields of many samples. Large rows are copied one by one, small ones shard by shard: each is quicker so."""
    out: dict[str, Array] = {}
    for name, info in next(iter(shards.values())).columns.items():
        columns = {number: _plain(shard.columns[name]) for number, shard in shards.items()}
        first = _plain(info)
        field = np.empty((len(rows), *first.shape[1:]), dtype=first.dtype)
        if len(shards) == 1 and _is_run(rows):
            field[...] = first[rows[0] : rows[-1] + 1]
        elif first.nbytes >= LARGE_ROW_BYTES * len(first):
            for k, (number, row) in enumerate(zip(numbers.tolist(), rows.tolist(), strict=True)):
                field[k] = columns[number][row]
        else:
            for number, column in columns.items():
                chosen = np.flatnonzero(numbers == number)
                field[chosen] = column[rows[chosen]]
        out[name] = field
    return out


def _plain(column: Column) -> Array:
    assert not isinstance(column, Ragged), "the constructor refuses these without a decode()"
    return column


def _is_run(rows: Integers) -> bool:
    return bool((np.diff(rows) == 1).all())


def _decoded(decode: Decode, sample_id: str, sample: Sample, random: np.random.Generator | None) -> Sample:
    """Raises `DeterministicError` naming the sample if the recipe's own code fails."""
    try:
        decoded = decode(sample, random)
    except (MemoryError, UnbrokenError):
        raise
    except Exception as error:
        message = f"sample {sample_id}: decode() failed: {type(error).__name__}: {error}"
        raise DeterministicError(message, records=[record_of(sample_id)]) from error
    if not isinstance(decoded, Mapping):
        raise UserError(f"sample {sample_id}: decode() gave {type(decoded).__name__}, not arrays by name")
    return decoded


def _changes_global_randomness(act: Callable[[], object]) -> bool:
    """Torch is not imported for this: what reads without training needs none."""
    torch = sys.modules.get("torch")

    def states() -> tuple[str, ...]:
        numpys = np.random.get_state(legacy=False)
        return repr(random.getstate()), repr(numpys), repr(torch.get_rng_state().tolist() if torch else None)

    before = states()
    act()
    return states() != before


def _sample(shard: Shard, row: int) -> Sample:
    return {name: column[row] for name, column in shard.columns.items()}


def _stack(samples: Sequence[Sample], ids: Sequence[str]) -> dict[str, Array]:
    first = {name: (np.shape(array), np.asarray(array).dtype) for name, array in samples[0].items()}
    for sample, sample_id in zip(samples, ids, strict=True):
        found = {name: (np.shape(array), np.asarray(array).dtype) for name, array in sample.items()}
        if found != first:
            raise UserError(f"sample {sample_id}: the recipe's decode() gave {found}, where others had {first}")
    return {name: np.stack([sample[name] for sample in samples]) for name in first}
