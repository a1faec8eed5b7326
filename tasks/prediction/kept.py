"""What is kept of predictions: an object for each shard, named by the digests of what went in and came out; and, last,
the manifest, without which none of them counts."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from tasks.done import find_result
from training.data.manifest import SPLITS, Manifest, ShardInfo, Split
from training.documents import digest_of, sha256_hex
from training.errors import MissingError
from training.s3.objectstore import Store

FORMAT = 1
NUM_AT_ONCE = 8
_NAME = re.compile(r"([0-9a-f]{64})-([0-9a-f]{64})\.parquet")

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PredictedShard:
    """One shard's predictions."""

    shard: str
    """sha256 of the shard that was read."""
    num_samples: int
    num_bytes: int
    sha256: str
    """Of the Parquet file, which is `shards/SHARD-SHA256.parquet`."""


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """The manifest: what was predicted, by what, from what. No time is in it."""

    model: str
    version: str
    run_key: str
    model_sha256: str
    dataset: str
    dataset_digest: str
    splits: dict[Split, tuple[PredictedShard, ...]]
    """In the order of the dataset's manifest."""
    format: int = FORMAT

    @property
    def num_samples(self) -> int:
        return sum(shard.num_samples for shards in self.splits.values() for shard in shards)


@dataclass(frozen=True, kw_only=True)
class Found:
    """A shard's predictions, as a listing shows them."""

    sha256: str
    num_bytes: int


def predictions_prefix(model: str, *, model_sha256: str, dataset_digest: str) -> str:
    """Where predictions lie: a function of the model's bytes and of the data, and of nothing else."""
    key = digest_of({"predictions": FORMAT, "model": model_sha256, "dataset": dataset_digest})
    return f"models/{model}/predictions/{key}/"


def manifest_key(prefix: str) -> str:
    return f"{prefix}manifest.json"


def shard_key(prefix: str, shard: str, sha256: str) -> str:
    return f"{prefix}shards/{shard}-{sha256}.parquet"


def find_shards(store: Store, prefix: str, shard: str = "") -> dict[str, Found]:
    """The predictions that are there, by their shard's sha256: of all shards, or of one.

    Two kinds of machine may have made two of one shard; all agree on the first by name.
    """
    found: dict[str, Found] = {}
    for key, num_bytes in sorted(store.list_keys(f"{prefix}shards/{shard}")):
        match = _NAME.fullmatch(key.removeprefix(f"{prefix}shards/"))
        if match:
            found.setdefault(match[1], Found(sha256=match[2], num_bytes=num_bytes))
    return found


def whole_shards(store: Store, prefix: str) -> dict[str, Found]:
    """The same, each read and proven. A damaged one is deleted, so that it is made again."""
    found = find_shards(store, prefix)

    def is_whole(shard: str) -> bool:
        key = shard_key(prefix, shard, found[shard].sha256)
        try:
            if sha256_hex(store.fetch(key)) == found[shard].sha256:
                return True
        except MissingError:  # another process found the damage too
            return False
        log.warning("%s is damaged, and predicted again", store.location.uri(key))
        store.delete(key)
        return False

    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        proofs = list(pool.map(is_whole, found))
    return {shard: each for (shard, each), proof in zip(found.items(), proofs, strict=True) if proof}


def shards_of(manifest: Manifest) -> dict[str, ShardInfo]:
    """A dataset version's shards by their sha256, each once, in its order."""
    return {info.sha256: info for split in SPLITS for info in manifest.splits[split]}


def complete(store: Store, prefix: str) -> Predictions | None:
    """The manifest, if there is one and every object that it names is there; to read them is left to those who do."""
    known = find_result(store, manifest_key(prefix), Predictions)
    if known is None:
        return None
    there = set(store.list_keys(f"{prefix}shards/"))
    named = (each for shards in known.splits.values() for each in shards)
    needed = {(shard_key(prefix, each.shard, each.sha256), each.num_bytes) for each in named}
    return known if needed <= there else None


def predicted(manifest: Manifest, found: dict[str, Found]) -> dict[Split, tuple[PredictedShard, ...]]:
    """What a manifest says of its splits."""

    def of(infos: Iterable[ShardInfo]) -> tuple[PredictedShard, ...]:
        return tuple(
            PredictedShard(
                shard=info.sha256,
                num_samples=info.num_samples,
                num_bytes=found[info.sha256].num_bytes,
                sha256=found[info.sha256].sha256,
            )
            for info in infos
        )

    return {split: of(manifest.splits[split]) for split in SPLITS}
