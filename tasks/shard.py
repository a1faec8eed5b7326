"""Stage 1: raw records to content-addressed shards and one manifest, which names the dataset version."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from prefect import task, unmapped
from prefect.cache_policies import NO_CACHE
from prefect.context import FlowRunContext

from infra.engines import make_launcher
from infra.store import store_location
from tasks.done import find_result, keep_result
from tasks.policy import stage_options
from tasks.results import Dataset
from tasks.shard_nodes import write_on_nodes
from tasks.stack import open_stack
from training.config import Preset
from training.data.activity import note_newest, read_activity
from training.data.lease import writing
from training.data.manifest import Manifest
from training.data.shard import FORMAT
from training.data.source import READING, Partition, open_source, partitions
from training.data.withdrawn import withdrawn_records
from training.data.writer import NUM_AT_ONCE, PartResult, Writer, WriteResult
from training.documents import digest_of
from training.recipe import load_recipe
from training.sources import source_closure_digest

log = logging.getLogger(__name__)


def shard_cache_key(context: Any, arguments: dict[str, Any]) -> str:
    """The source's listing (names, sizes, times), the settings and the recipe's source.

    And what `unbroken data` did since: a version that was removed, or found damaged, is not one that is finished.
    """
    preset: Preset = arguments["preset"]
    settings, store = open_stack()
    source = open_source(preset.data, folder=preset.folder, location=store_location(settings))
    recipe = load_recipe(preset)
    return digest_of(
        {
            "stage": "shard",
            "format": FORMAT,
            "reading": READING,
            "listing": [asdict(part) for part in partitions(source, preset.data)],
            "data": asdict(preset.data),
            "recipe": [source_closure_digest(recipe), asdict(recipe)],
            "withdrawn": sorted(withdrawn_records(store, preset.data.name)),
            "generation": read_activity(store, preset.data.name).generation,
        }
    )


@task(name="shard", cache_key_fn=shard_cache_key, **stage_options(timeout_seconds=24 * 3600))
def shard(preset: Preset, *, owner: str | None = None) -> Dataset:
    """Shard the preset's source. Finished partitions are not read into shards, nor sent, again; and nothing is read if
    the source's listing, and all else that decides, is as it was.

    `owner` names who started it (a flow run's id), so that cancelling that cancels nodes that shard for it.

    Raises `UserError` naming the source, file or record that cannot be read.
    """
    settings, store = open_stack()
    key = _result_key(preset)
    known = find_result(store, key, Dataset)
    if known is not None:
        if read_activity(store, known.name).newest != known.digest:
            note_newest(store, known.name, known.digest)
        log.info("dataset %s@%s: the source is as it was", known.name, known.digest[:12])
        return known
    if preset.launch.shard_nodes and settings.engine != "local":
        write_on_nodes(make_launcher(settings), store, preset, owner=owner)
    source = open_source(preset.data, folder=preset.folder, location=store_location(settings))
    writer = Writer(
        store, source, preset.data, load_recipe(preset), withdrawn=withdrawn_records(store, preset.data.name)
    )
    with writing(store, preset.data.name) as lease:
        written = writer.finish(write_parts(writer), lease)
        made = _dataset(preset, written.manifest)
        # else the source changed since it was first listed, or somebody may be collecting what this would replace
        if _result_key(preset) == key and lease.is_sure:
            keep_result(store, key, made)
    _tell(preset, written)
    return made


def _dataset(preset: Preset, manifest: Manifest) -> Dataset:
    return Dataset(
        name=preset.data.name,
        digest=manifest.digest,
        num_train_samples=manifest.num_samples("train"),
        num_test_samples=manifest.num_samples("test"),
        num_shards=sum(len(shards) for shards in manifest.splits.values()),
        num_bytes=manifest.num_bytes(),
    )


def _result_key(preset: Preset) -> str:
    return f"datasets/{preset.data.name}/results/{shard_cache_key(None, {'preset': preset})}.json"


def _tell(preset: Preset, written: WriteResult) -> None:
    manifest = written.manifest
    log.info(
        "dataset %s@%s: %s train and %s test samples; %d of %d partitions found finished, %d shards sent",
        preset.data.name,
        manifest.digest[:12],
        f"{manifest.num_samples('train'):,}",
        f"{manifest.num_samples('test'):,}",
        written.num_partitions_reused,
        written.num_partitions,
        written.num_shards_sent,
    )
    if written.displaced:
        log.warning(
            "left out by their ids, although they are not what was withdrawn under these (has the source changed since?"
            ' docs/data.md, "Withdrawing"): %s',
            ", ".join(written.displaced[:8]) + (", …" if len(written.displaced) > 8 else ""),
        )


def write_parts(writer: Writer) -> list[PartResult]:
    """Some partitions at a time: as mapped tasks inside a flow run, so that each is tried again by itself; else by
    threads.
    """
    progress = Progress(writer.parts)
    if FlowRunContext.get() is not None:
        futures = write_part.map(unmapped(writer), writer.parts)
        return [progress.after(future.result()) for future in futures]
    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        return [progress.after(result) for result in pool.map(writer.write, writer.parts)]


@task(name="shard-part", cache_policy=NO_CACHE, **{**stage_options(timeout_seconds=12 * 3600), "persist_result": False})
def write_part(writer: Writer, part: Partition) -> PartResult:
    """One partition. Its receipt on the store is its cache."""
    return writer.write(part)


class Progress:
    """Says how far the partitions are: with the rate, and when they will be done."""

    def __init__(self, parts: Sequence[Partition]) -> None:
        self._num_parts = len(parts)
        self._num_bytes = sum(part.num_bytes for part in parts)
        self._parts_done = self._bytes_done = self._shards_sent = 0
        self._started = time.monotonic()

    def after(self, result: PartResult) -> PartResult:
        """Count a finished partition, and show the line."""
        self._parts_done += 1
        self._bytes_done += result.num_bytes
        self._shards_sent += result.num_shards_sent
        log.info("%s", self.line(time.monotonic() - self._started), extra={"is_progress": True})
        return result

    def line(self, seconds: float) -> str:
        rate = self._bytes_done / max(seconds, 1e-6)
        left = (self._num_bytes - self._bytes_done) / max(rate, 1.0)
        return (
            f"partition {self._parts_done}/{self._num_parts}  {self._bytes_done / 1e6:,.1f} of"
            f" {self._num_bytes / 1e6:,.1f} MB  {rate / 1e6:,.1f} MB/s  {self._shards_sent} shards sent"
            f"  {left:,.0f} s left"
        )
