"""From a preset and a dataset version to the reader of a split, and to the order of training. Imports no torch."""

from __future__ import annotations

from training.config import Preset
from training.data.cache import ShardCache, fetch_from
from training.data.manifest import Manifest, Split
from training.data.order import Order
from training.data.reader import Reader
from training.recipe import Recipe, maybe_decode
from training.s3.objectstore import Store


def open_reader(store: Store, preset: Preset, recipe: Recipe, manifest: Manifest, split: Split) -> Reader:
    """One split of a dataset version, decoded by the recipe."""
    launch = preset.launch
    cache = ShardCache(
        fetch_from(store, preset.data.name),
        manifest.splits[split],
        memory_bytes=launch.cache_memory_bytes,
        disk_bytes=launch.cache_disk_bytes,
    )
    sizes = manifest.shard_sizes(split)
    return Reader(cache, sizes, manifest.fields, maybe_decode=maybe_decode(recipe), seed=preset.seed)


def open_order(preset: Preset, manifest: Manifest) -> Order:
    """The order in which the preset trains on a dataset version."""
    train = preset.train
    return Order(
        manifest.shard_sizes("train"), preset.seed, train.batch_size, train.virtual_workers, train.shuffle_window_shards
    )
