"""Stage 1: raw records to content-addressed shards and one manifest, which names the dataset version."""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import Any

from prefect import task

from tasks.policy import stage_options
from tasks.results import Dataset
from tasks.stack import open_stack, store_location
from training.config import Preset
from training.data.source import open_source, partitions
from training.data.writer import write_dataset
from training.documents import digest_of
from training.recipe import load_recipe, source_closure_digest

log = logging.getLogger(__name__)


def shard_cache_key(context: Any, arguments: dict[str, Any]) -> str:
    """The source's listing (names, sizes, times), the settings and the recipe's source."""
    preset: Preset = arguments["preset"]
    settings, _ = open_stack()
    source = open_source(preset.data, folder=preset.folder, location=store_location(settings))
    recipe = load_recipe(preset)
    return digest_of(
        {
            "stage": "shard",
            "listing": [asdict(part) for part in partitions(source, preset.data)],
            "data": asdict(preset.data),
            "recipe": [source_closure_digest(recipe), asdict(recipe)],
        }
    )


@task(name="shard", cache_key_fn=shard_cache_key, **stage_options(timeout_seconds=24 * 3600))
def shard(preset: Preset) -> Dataset:
    """Shard the preset's source. Finished partitions are not read into shards, nor sent, again.

    Raises `UserError` naming the source, file or record that cannot be read.
    """
    settings, store = open_stack()
    recipe = load_recipe(preset)
    source = open_source(preset.data, folder=preset.folder, location=store_location(settings))
    written = write_dataset(
        store, source, preset.data, recipe, report=lambda done, total: log.info("partition %d of %d", done, total)
    )
    manifest = written.manifest
    log.info(
        "dataset %s: %d of %d partitions found finished, %d shards sent",
        manifest.digest[:12],
        written.num_partitions_reused,
        written.num_partitions,
        written.num_shards_sent,
    )
    return Dataset(
        name=preset.data.name,
        digest=manifest.digest,
        num_train_samples=manifest.num_samples("train"),
        num_test_samples=manifest.num_samples("test"),
        num_shards=sum(len(shards) for shards in manifest.splits.values()),
        num_bytes=manifest.num_bytes(),
    )
