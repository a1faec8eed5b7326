"""The training loop of one rank."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from training.checkpoint import load_initial, newest_proven
from training.config import Preset
from training.control import Note
from training.data import ledger
from training.data.stream import Microbatch
from training.errors import DamagedError, DeterministicError, InfrastructureError
from training.events import EventWriter, json_number
from training.exact import ExactReducer
from training.extras import Extras
from training.fast import FastReducer
from training.objective import Objective, fill_new_memory, recipe_errors, seed_streams, stream_seed
from training.recipe import Recipe, learning_rate_scale
from training.record import CheckpointRef, InitialWeights, Result, RunRecord, with_result, with_resume_step
from training.saver import CheckpointSaver
from training.state import TrainState
from training.validation import HeldOut, validate


@dataclass(frozen=True, kw_only=True)
class Rank:
    """Which part of the group this process is."""

    rank: int
    world_size: int
    token: int
    device: torch.device


class Reducer(Protocol):
    """Mean gradients over all virtual workers: training.exact or training.fast."""

    owned: range

    def forward(self, worker: int, batch: Mapping[str, Tensor]) -> Tensor: ...

    def backward(self, worker: int, loss: Tensor, extras: Tensor) -> None: ...

    def finish(self) -> Tensor: ...


class Feed(Protocol):
    """Where a rank's samples come from (training.data.loader has the real one)."""

    def microbatches(self, *, workers: Sequence[int], step: int) -> Iterator[Microbatch]:
        """Of the given virtual workers, from `step` on, in the order of (step, worker)."""
        ...

    def held_out(self) -> HeldOut:
        """The samples of the test split."""
        ...


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What a step gave, the same on every rank."""

    loss: float
    grad_norm: float
    samples: str
    """The step's line in the ledger (training.data.ledger)."""
    validation: Mapping[str, float] = field(default_factory=dict)
    """The means of the held-out scores, if they were due after this step."""


class Trainer:
    """Trains one run to its end, from wherever it stands. `train` is collective."""

    def __init__(
        self,
        *,
        preset: Preset,
        recipe: Recipe,
        feed: Feed,
        initial: InitialWeights | None = None,
        run: RunRecord,
        saver: CheckpointSaver,
        events: EventWriter | None,
        rank: Rank,
        tell: Callable[[Note], None] = lambda note: None,
    ) -> None:
        """`tell` hears how far this rank has come."""
        self.preset = preset
        self.recipe = recipe
        self.feed = feed
        self._maybe_microbatches: Iterator[Microbatch] | None = None
        self._maybe_held_out: HeldOut | None = None
        self.initial = initial
        self.run = run
        self.saver = saver
        self.maybe_events = events
        self.rank = rank
        self.tell = tell
        self.state = TrainState(recipe, seed=preset.seed, device=rank.device)
        self.extras = Extras(self.state.model)
        self.reducer = self.make_reducer()

    def make_reducer(self) -> Reducer:
        train = self.preset.train
        objective = Objective(self.recipe, self.state.model, precision=train.precision)
        group = {
            "virtual_workers": train.virtual_workers,
            "rank": self.rank.rank,
            "world_size": self.rank.world_size,
        }
        if train.mode == "fast":
            return FastReducer(objective, **group)
        return ExactReducer(objective, num_extras=self.extras.num_elements, **group)

    def train(self) -> None:
        """Resume, step to the end, checkpoint on the way, and commit the result."""
        self.resume()
        config = self.preset.train
        fill_new_memory(True)  # with NaN: a recipe that reads it, and has other bits each time, is found in one step
        while self.state.step < config.steps:
            started = time.monotonic()
            outcome = self.train_step()
            fill_new_memory(False)  # it costs up to a tenth of a step
            self.report_step(outcome, seconds=time.monotonic() - started)
            if self.state.step % config.checkpoint_every_steps == 0 and self.state.step < config.steps:
                self.save_checkpoint()
        self.finish()

    def resume(self) -> None:
        """Take up the newest proven checkpoint, or begin at step 0, as a rule with new weights; rank 0 notes which."""
        found = newest_proven(self.run, token=self.rank.token)
        if found is not None:
            reference, tensors = found
            self.state.load(tensors, step=reference.step)
        elif self.initial is not None:
            self.state.load_weights(load_initial(self.run.store, self.initial))
        self.saver.require_agreement(self.state.step)
        step, token = self.state.step, self.rank.token
        if self.rank.rank == 0:
            self.run.update(lambda record: with_resume_step(record, step, token=token))
        self.emit("attempt", world_size=self.rank.world_size, resumed_from=step)
        self.tell(Note(event="began", step=step))

    def train_step(self) -> StepOutcome:
        """One synchronous step: each owned virtual worker's gradient, the mean over all ranks, one optimizer step."""
        step = self.state.step
        self.state.require_same_parameters()
        self.extras.begin_step()
        for worker in self.reducer.owned:
            self.virtual_worker_step(worker)
        total = self.reducer.finish()
        loss = self.extras.hand_out(total / self.preset.train.virtual_workers)
        grad_norm = self.clip()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise DeterministicError(f"step {step + 1}: the loss is {loss}, the gradient norm {grad_norm}")
        self.state.set_learning_rate_scale(learning_rate_scale(self.recipe, step, self.preset.train.steps))
        with recipe_errors(f"step {step + 1}, optimizer.step()"):
            self.state.optimizer.step()
        self.state.step = step + 1
        samples = self.extras.ledger_line(total)
        return StepOutcome(loss=loss, grad_norm=grad_norm, samples=samples, validation=self.maybe_validate())

    def maybe_validate(self) -> Mapping[str, float]:
        """Held-out scores, every so many steps."""
        every = self.preset.train.validate_every_steps
        if every is None or self.state.step % every:
            return {}
        self._maybe_held_out = self._maybe_held_out or self.feed.held_out()
        return validate(
            self.recipe,
            self.state.model,
            self._maybe_held_out,
            batch_size=self.preset.evaluate.batch_size,
            max_samples=self.preset.evaluate.max_samples,
            rank=self.rank.rank,
            world_size=self.rank.world_size,
        )

    def virtual_worker_step(self, worker: int) -> None:
        """Forward and backward of one virtual worker's microbatch."""
        ids, batch = self.microbatch(worker)
        self.extras.begin_worker()
        seed_streams(stream_seed(self.preset.seed, self.state.step, worker), self.rank.device)
        with recipe_errors(f"step {self.state.step + 1}, virtual worker {worker}", ids):
            loss = self.reducer.forward(worker, batch)
            if not torch.isfinite(loss):
                raise DeterministicError(
                    f"step {self.state.step + 1}, virtual worker {worker}: the loss is {loss.item()};"
                    f" samples {', '.join(ids[:8])}{', …' if len(ids) > 8 else ''}"
                )
            self.reducer.backward(worker, loss, self.extras.gather(loss.detach(), ledger.entries(worker, ids)))

    def microbatch(self, worker: int) -> tuple[Sequence[str], Mapping[str, Tensor]]:
        """Ids and tensors of the next microbatch, which is `worker`'s own of this step."""
        if self._maybe_microbatches is None:
            self._maybe_microbatches = self.feed.microbatches(workers=self.reducer.owned, step=self.state.step)
        batch = next(self._maybe_microbatches)
        assert (batch.step, batch.worker) == (self.state.step, worker)
        return batch.ids, {name: torch.from_numpy(array).to(self.rank.device) for name, array in batch.fields.items()}

    def clip(self) -> float:
        """Scale the gradients; returns the norm before. It is taken parameter by parameter, whoever has which."""
        gradients = [p.grad for p in self.state.model.parameters() if p.grad is not None]
        norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))))
        limit = self.preset.train.clip_norm
        if limit is not None and norm > limit:
            torch._foreach_mul_(gradients, limit / norm)
        return norm

    def report_step(self, outcome: StepOutcome, *, seconds: float) -> None:
        self.emit(
            "step",
            **{**vars(outcome), "validation": {name: json_number(mean) for name, mean in outcome.validation.items()}},
            learning_rate=float(self.state.optimizer.param_groups[0]["lr"]),
            samples_per_second=self.preset.train.batch_size / seconds,
        )
        self.tell(Note(event="step", step=self.state.step))

    def save_checkpoint(self) -> None:
        """Start saving, off this thread."""
        self.settle_checkpoint()
        self._save(on_commit=self._note_commit)

    def _save(self, *, on_commit: Callable[[CheckpointRef], None]) -> None:
        agreed = self.state.unsummed_digests()
        self.saver.save(self.state.step, self.state.tensors(), agreed=agreed, on_commit=on_commit)

    def settle_checkpoint(self) -> None:
        """Wait for the one before. A store that is away makes a checkpoint missing, never the training stop."""
        try:
            self.saver.wait()
        except (InfrastructureError, DamagedError) as error:
            self.emit("checkpoint_failed", reason=str(error))

    def finish(self) -> None:
        """Prove the last state, then commit the result. Only rank 0 speaks to the record."""
        final: list[CheckpointRef] = []
        self.settle_checkpoint()
        self._save(on_commit=final.append)
        self.saver.wait()
        if self.rank.rank == 0:
            result = Result(
                step=self.state.step,
                weights_sha256=self.state.weights_sha256(),
                state_sha256=self.state.state_sha256(),
                checkpoint=final[0],
            )
            self._note_commit(final[0])
            self.emit("finished")
            assert self.maybe_events is not None
            self.maybe_events.close()
            self.run.update(lambda record: with_result(record, result, token=self.rank.token))

    def emit(self, kind: str, **values: object) -> None:
        if self.maybe_events is not None:
            self.maybe_events.add(kind, step=self.state.step, **values)

    def _note_commit(self, checkpoint: CheckpointRef) -> None:
        if self.maybe_events is not None:
            self.maybe_events.add("checkpoint", step=checkpoint.step, sha256=checkpoint.sha256)
