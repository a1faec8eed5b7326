"""Which records make a step fail, as the rank finds that computes them; how it searches is in poison.py."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from training.arithmetic.collectives import texts_of_all_ranks
from training.arithmetic.extras import Extras
from training.checkpoints.state import TrainState
from training.config import Preset
from training.data.stream import Microbatch
from training.diagnosis.poison import Replay, Samples, explained
from training.errors import DeterministicError
from training.memory.handover import Handover
from training.recipe import Recipe


class Feed(Protocol):
    def microbatches(self, *, workers: Sequence[int], step: int) -> Iterator[Microbatch]: ...


class Explainer:
    """Replays what failed, on the state that the step began with."""

    def __init__(self, recipe: Recipe, preset: Preset, feed: Feed, *, handover: Handover, device: torch.device) -> None:
        """Others wait while this rank replays; `handover` says so to its agent."""
        self._recipe = recipe
        self._preset = preset
        self._feed = feed
        self._handover = handover
        self._device = device
        self.seconds = preset.launch.collective_timeout_seconds / 2
        """How long a search may take: the other ranks must not give this one up meanwhile."""

    def of_worker(
        self, error: DeterministicError, worker: int, samples: Samples, state: TrainState, extras: Extras
    ) -> DeterministicError | RuntimeError | None:
        """The error with the records that cause it; an ordinary one if it comes now and then when the microbatch is
        replayed, None if it does not."""
        train = self._preset.train
        replay = Replay(self._recipe, state, extras, seed=self._preset.seed, precision=train.precision)
        other_step = state.step + 1 if state.step + 1 < train.steps else max(0, state.step - 1)
        with self._handover.waiting():
            return explained(
                error,
                partial(replay.failure, worker),
                samples,
                lambda: self._samples_of(worker, other_step),
                seconds=self.seconds,
            )

    def of_ranks(
        self,
        error: DeterministicError,
        workers: Sequence[int],
        state: TrainState,
        extras: Extras,
        *,
        maybe_own: DeterministicError | None = None,
        maybe_broken: str | None = None,
    ) -> DeterministicError | RuntimeError:
        """What all ranks found wrong at once: whether it is one of these virtual workers'; `maybe_own` is what this
        rank saw of one, and `maybe_broken` what kept it from computing its own with others. Collective: who finds
        nothing waits for who does, and says the same; of those who find it, whoever saw it is believed. If nobody does,
        and a connection broke, it was that, and comes now and then."""
        first = self.of_workers(maybe_own or error, workers, state, extras)
        if first is maybe_own:  # it did not come again
            first = RuntimeError(str(first))
        if first is error and maybe_broken is not None:
            first = RuntimeError(maybe_broken)
        own = None if first is error else _told(first, has_seen=maybe_own is not None)
        with self._handover.waiting():
            told = [json.loads(text) for text in texts_of_all_ranks(json.dumps(own))]
        if maybe_own is not None or not any(told):
            return first
        message, maybe_records, _ = min(filter(None, told), key=lambda one: (not one[-1], one[1] is None))
        return RuntimeError(message) if maybe_records is None else DeterministicError(message, records=maybe_records)

    def of_workers(
        self, error: DeterministicError, workers: Sequence[int], state: TrainState, extras: Extras
    ) -> DeterministicError | RuntimeError:
        """What is wrong with one of these virtual workers, or the error."""
        found = (
            self.of_worker(error, worker, self._samples_of(worker, state.step), state, extras) for worker in workers
        )
        return next((one for one in found if one is not None), error)

    def _samples_of(self, worker: int, step: int) -> Samples:
        """Read anew."""
        batch = next(self._feed.microbatches(workers=[worker], step=step))
        return batch.ids, on_device(batch, self._device)


def _told(error: DeterministicError | RuntimeError, *, has_seen: bool) -> tuple[str, Sequence[str] | None, bool]:
    """With its records, as whichever rank ends first is believed; None: it comes now and then."""
    return str(error), error.records if isinstance(error, DeterministicError) else None, has_seen


def on_device(batch: Microbatch, device: torch.device) -> Mapping[str, Tensor]:
    return {name: torch.from_numpy(array).to(device) for name, array in batch.fields.items()}
