"""The microbatches of one rank: by its own threads, or by processes that read for it."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from multiprocessing.context import BaseContext
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from training.beside import beside
from training.config import Preset
from training.data.manifest import load_manifest
from training.data.opening import open_order, open_reader
from training.data.reader import Reader
from training.data.stream import Microbatch, Stream
from training.errors import UnbrokenError
from training.processes import die_after
from training.recipe import load_recipe
from training.runs.failures import ReaderDiedError
from training.s3.objectstore import StoreLocation, shared_store

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Feed:
    """What a rank reads. Small, so that it can be sent to processes that read for the rank."""

    preset: Preset
    location: StoreLocation
    dataset_digest: str

    def microbatches(self, *, workers: Sequence[int], step: int) -> Iterator[Microbatch]:
        """Of the virtual workers `workers`, from `step` to the run's end, in the order of (step, worker)."""
        num_processes = min(len(workers), self.preset.launch.data_workers)
        if num_processes == 0:
            return begun(lambda: self._stream(workers, step))
        loader = DataLoader(
            _FeedDataset(self, workers, step),
            batch_size=None,
            num_workers=num_processes,
            multiprocessing_context=_fork_server(),
            generator=torch.Generator(),  # else it draws from the one that the model's dropout draws from
        )
        return _in_order(_received(loader), len(workers), num_processes)

    def held_out(self) -> Reader:
        """The samples of the test split."""
        store = shared_store(self.location)
        manifest = load_manifest(store, self.preset.data.name, self.dataset_digest)
        return open_reader(store, self.preset, load_recipe(self.preset), manifest, "test")

    def _stream(self, workers: Sequence[int], step: int) -> Stream:
        store = shared_store(self.location)
        manifest = load_manifest(store, self.preset.data.name, self.dataset_digest)
        reader = open_reader(store, self.preset, load_recipe(self.preset), manifest, "train")
        order = open_order(self.preset, manifest)
        return Stream(reader, order, workers=workers, step=step, num_steps=self.preset.train.steps)


def begun(make: Callable[[], Iterable[Item]]) -> Iterator[Item]:
    """All that `make` gives; the first is being made from now on, beside the caller."""

    def begin() -> tuple[list[Item], Iterator[Item]]:
        items = iter(make())
        return [*islice(items, 1)], items

    beginning = beside(begin)

    def give() -> Iterator[Item]:
        first, others = beginning.result()
        yield from first
        yield from others

    return give()


@dataclass(frozen=True)
class _Failed:
    """An error of ours on its way to the rank: torch would send its traceback as its message."""

    error: UnbrokenError


Share = tuple[Microbatch, ...]
"""Of one process in one step."""


def _in_order(shares: Iterator[Share], num_workers: int, num_processes: int) -> Iterator[Microbatch]:
    """The processes take turns, in each step."""
    while step := list(islice(shares, num_processes)):
        for number in range(num_workers):
            yield step[number % num_processes][number // num_processes]


def _received(loader: Iterable[Share | _Failed]) -> Iterator[Share]:
    items = iter(loader)
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except RuntimeError as error:
            raise _reason(error, items) from error
        if isinstance(item, _Failed):
            raise item.error
        yield item


def _reason(error: RuntimeError, items: Any) -> Exception:
    """Torch says which process is gone, but not how it ended."""
    codes = [process.exitcode for process in items._workers if process.exitcode]
    return ReaderDiedError(codes[0]) if codes else error


class _FeedDataset(IterableDataset["Share | _Failed"]):
    """The share of one DataLoader process: every n-th virtual worker. So a shard is fetched by one process."""

    def __init__(self, feed: Feed, workers: Sequence[int], step: int) -> None:
        self._feed = feed
        self._workers = workers
        self._step = step
        self._rank_pid = os.getpid()

    def __iter__(self) -> Iterator[Share | _Failed]:
        die_after(self._rank_pid)
        torch.set_num_threads(1)
        info = get_worker_info()
        assert info is not None
        workers = self._workers[info.id :: info.num_workers]
        try:
            microbatches = iter(self._feed._stream(workers, self._step))
            while share := tuple(islice(microbatches, len(workers))):
                yield share
        except UnbrokenError as error:
            yield _Failed(error)


def _fork_server() -> BaseContext:
    """Its processes are forked from one that has imported this module and done nothing else: so they start at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context
