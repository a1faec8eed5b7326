"""Which record kills a worker: what it did is done again in processes that may die, forked from a zygote of their own.

A group whose predecessors died twice alike (training.runs.failures.crash_to_explain) looks before it does the same.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training import tensorfile
from training.arithmetic.extras import Extras
from training.checkpoints.snapshot import Image
from training.checkpoints.state import TrainState
from training.cluster.zygote import Zygote
from training.data.loader import Feed
from training.data.manifest import load_manifest
from training.data.opening import open_order, open_reader
from training.data.order import Integers
from training.data.stream import MAX_BLOCK_STEPS
from training.data.withdrawn import record_of
from training.diagnosis.poison import Replay, keeping, told
from training.documents import parse
from training.errors import DeterministicError
from training.recipe import load_recipe, maybe_decode
from training.runs.failures import CRASH_SIGNALS
from training.s3.objectstore import shared_store

READ_AHEAD_STEPS = 2 * MAX_BLOCK_STEPS
"""Threads decode samples so many steps before they are used, at most."""
ENTRY = f"{__name__}:replay"
Indexed = tuple[Integers, Integers]
"""Samples' indices, and the epoch in which each is read."""


@dataclass(frozen=True, kw_only=True)
class ReplayOrder:
    """What a process does that may die: read samples, and if there is a state, compute their gradients."""

    feed: Feed
    indices: tuple[int, ...] = ()
    epochs: tuple[int, ...] = ()
    worker: int = 0
    """The virtual worker."""
    step: int = 0
    """That of the state."""
    local_rank: int = 0
    state_fd: int = -1


def replay(document: Mapping[str, Any]) -> int:
    """In a forked process. What it raises does not count: it did not die of it."""
    from training.arithmetic.determinism import settle_arithmetic

    order = parse(ReplayOrder, document)
    device = settle_arithmetic(order.local_rank)
    preset = order.feed.preset
    recipe = load_recipe(preset)
    with closing(_Samples(order.feed)) as samples:
        rows = samples.reader.read(order.indices, maybe_epochs=np.array(order.epochs, dtype=np.int64))
    if order.state_fd >= 0:
        state = TrainState(recipe, seed=preset.seed, device=device)
        state.load(tensorfile.tensors(memoryview(mmap.mmap(order.state_fd, 0))), step=order.step)
        extras = Extras(state.model)
        extras.hold()
        batch = {name: torch.from_numpy(array).to(device) for name, array in rows.fields.items()}
        Replay(recipe, state, extras, seed=preset.seed, precision=preset.train.precision).failure(order.worker, batch)
    return 0


class _Samples:
    """What a feed reads, by its index."""

    def __init__(self, feed: Feed) -> None:
        store = shared_store(feed.location)
        manifest = load_manifest(store, feed.preset.data.name, feed.dataset_digest)
        self.order = open_order(feed.preset, manifest)
        self.reader = open_reader(store, feed.preset, load_recipe(feed.preset), manifest, "train")

    def close(self) -> None:
        self.reader.close()


class Crashes:
    """Looks for what kills a worker. Raises `DeterministicError` naming the record, if it is found."""

    def __init__(self, feed: Feed, *, local_rank: int, seconds: float) -> None:
        """Each look is given up after so many seconds."""
        self._feed = feed
        self._local_rank = local_rank
        self._seconds = seconds
        self._zygote = Zygote(feed.preset, entry=ENTRY)

    def require_readable(self, workers: Sequence[int], start: int, stop: int) -> None:
        """All samples of some virtual workers that are decoded for the steps after `start` up to `stop`, and ahead."""
        num_steps = min(stop + READ_AHEAD_STEPS, self._feed.preset.train.steps) - start
        if num_steps < 1 or maybe_decode(load_recipe(self._feed.preset)) is None:  # no code of the recipe's runs there
            return
        with closing(_Samples(self._feed)) as samples:
            parts = [samples.order.samples(worker, step=start, num_steps=num_steps) for worker in workers]
            indices, epochs = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
            look = _Look(self._zygote, samples, time.monotonic() + self._seconds)
            look.require(ReplayOrder(feed=self._feed), (indices, epochs), None, "when samples are decoded")

    def require_survivable(self, workers: Sequence[int], step: int, tensors: Mapping[str, Tensor]) -> None:
        """The step after `step`, whose state `tensors` is, of some virtual workers."""
        other_step = step + 1 if step + 1 < self._feed.preset.train.steps else max(0, step - 1)
        with closing(self._zygote), closing(_Samples(self._feed)) as samples, _shared(tensors) as state_fd:
            look = _Look(self._zygote, samples, time.monotonic() + self._seconds)
            base = ReplayOrder(feed=self._feed, step=step, local_rank=self._local_rank, state_fd=state_fd)
            for worker in workers:
                read, others = (samples.order.samples(worker, step=number) for number in (step, other_step))
                where = f"in step {step + 1}, virtual worker {worker}"
                look.require(replace(base, worker=worker), read, others, where)


@dataclass(frozen=True)
class _Look:
    """Until `deadline`, by time.monotonic()."""

    zygote: Zygote
    samples: _Samples
    deadline: float

    def require(self, order: ReplayOrder, read: Indexed, maybe_others: Indexed | None, where: str) -> None:
        """Raises `DeterministicError` if a process dies of what was read; `maybe_others` is what was not."""
        records = [record_of(sample) for sample in self.samples.reader.ids(read[0])]
        seconds = self.deadline - time.monotonic()

        def dies(some: Sequence[str]) -> bool:
            chosen = maybe_others
            if some:
                places = keeping(records, some)
                chosen = read[0][places], read[1][places]
            return chosen is not None and _dies(self.zygote, order, chosen, self.deadline - time.monotonic())

        message = f"workers died twice alike, and so do replays {where}"
        error = told(DeterministicError(message), dies, records, seconds=seconds)
        if isinstance(error, DeterministicError):  # who dies now and then may come through
            raise error


def _dies(zygote: Zygote, order: ReplayOrder, samples: Indexed, seconds: float) -> bool:
    """Whether a process does, of itself. Raises `TimeoutError`."""
    if seconds <= 0:
        raise TimeoutError
    indices, epochs = samples
    order = replace(order, indices=tuple(indices.tolist()), epochs=tuple(epochs.tolist()))
    fds = {"state_fd": order.state_fd} if order.state_fd >= 0 else {}
    process = zygote.start(asdict(order), fds)
    try:
        return -process.wait(seconds) in CRASH_SIGNALS
    except TimeoutError:
        process.kill()
        raise


@contextmanager
def _shared(tensors: Mapping[str, Tensor]) -> Iterator[int]:
    """A file in memory with the tensors."""
    image = Image(tensors)
    fd = os.memfd_create("state")
    try:
        os.ftruncate(fd, image.num_bytes)
        with mmap.mmap(fd, image.num_bytes) as memory:
            image.write(memoryview(memory))
        yield fd
    finally:
        os.close(fd)
