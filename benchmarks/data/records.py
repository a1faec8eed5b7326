"""The records of the benchmark: the same for every contestant, made by arithmetic, and a checksum of what was read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np

BATCH_SIZE = 64
SHARD_BYTES = 8 << 20


@dataclass(frozen=True, kw_only=True)
class Kind:
    """`x` of one dtype and shape, and a label `y`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_samples: int

    @cached_property
    def sample_bytes(self) -> int:
        return int(np.dtype(self.dtype).itemsize * np.prod(self.shape)) + 8

    def sample(self, index: int) -> dict[str, Any]:
        """A fresh copy of sample `index`."""
        num_bytes = self.sample_bytes - 8
        start = index * 64 % (len(_noise()) - num_bytes)
        x = _noise()[start : start + num_bytes].view(self.dtype).reshape(self.shape).copy()
        return {"x": x, "y": np.int64(index)}


KINDS = {
    "image": Kind(name="image", dtype="uint8", shape=(3, 64, 64), num_samples=16_384),
    "tokens": Kind(name="tokens", dtype="int32", shape=(128,), num_samples=262_144),
}


@cache
def _noise() -> np.ndarray[Any, Any]:
    """Incompressible, so that no contestant gains by compression."""
    return np.random.default_rng(7).integers(0, 256, 1 << 25, dtype=np.uint8)


class Checksum:
    """Of labels and of one value per sample: cheap, the same in any order, and wrong if a sample is lost or doubled."""

    def __init__(self) -> None:
        self.num_samples = 0
        self.total = 0

    def add(self, x: Any, y: Any) -> None:
        x, y = np.asarray(x), np.asarray(y).astype(np.int64).reshape(-1)
        firsts = x.reshape(len(y), -1)[:, 0].astype(np.int64)
        self.num_samples += len(y)
        self.total += int(((y + 1) * 31 + firsts * (y % 97)).sum())


def expected(kind: Kind) -> Checksum:
    checksum = Checksum()
    for index in range(kind.num_samples):
        sample = kind.sample(index)
        checksum.add(sample["x"][None], [sample["y"]])
    return checksum
