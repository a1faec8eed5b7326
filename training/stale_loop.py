"""The training loop of one rank with bounded staleness: rounds of steps in which no rank waits for the slowest, as long
as it is not too far ahead, and between two rounds a barrier, at which all have made the same steps.

Only at a barrier is there a state that could be saved or judged, and only there do ranks say anything to one another.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from training.arithmetic.balance import ranges
from training.arithmetic.buffers import Buffers
from training.arithmetic.collectives import of_all_ranks
from training.arithmetic.exact import require_float32
from training.arithmetic.extras import NUM_CONTROL_WORDS, Control
from training.arithmetic.norm import block_norms, norm_of
from training.arithmetic.objective import Objective, fill_new_memory
from training.arithmetic.sparse import have_whole_gradients
from training.checkpoint_loop import CheckpointTrainer
from training.control import Note
from training.data import ledger
from training.errors import DeterministicError
from training.recipe import learning_rate_scale
from training.runs.events import Entry
from training.servers.arithmetic import Decision
from training.servers.stale_ranks import StaleServers
from training.step import lost_with_a_peer


class OwnGradients:
    """The mean gradients of a rank's own virtual workers, where the other reducers have those of all."""

    def __init__(self, objective: nn.Module, owned: range) -> None:
        """Raises `UserError` if a parameter is not float32."""
        self.owned = owned
        self._objective = objective
        self._trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
        require_float32(self._trained)
        have_whole_gradients(objective)
        self._maybe_extras: Tensor | None = None

    def forward(self, worker: int, batch: Mapping[str, Tensor]) -> Tensor:
        loss: Tensor = self._objective(batch)
        return loss

    def backward(self, worker: int, loss: Tensor, extras: Tensor) -> None:
        if worker == self.owned.start:
            self.close()
        (loss / len(self.owned)).backward()  # type: ignore[no-untyped-call]  # torch has no annotation here
        self._maybe_extras = extras if self._maybe_extras is None else self._maybe_extras + extras

    def gradients(self) -> list[Tensor]:
        """Zeros where the loss does not reach."""
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self._trained]

    def finish(self) -> Tensor:
        """The sum of the extras."""
        assert self._maybe_extras is not None
        return self._maybe_extras

    def close(self) -> None:
        self._maybe_extras = None
        for parameter in self._trained:
            parameter.grad = None


class Round:
    """What a rank has done since the last barrier, to be added up with what the others have."""

    def __init__(self, model: nn.Module) -> None:
        self._buffers = Buffers(model)
        self._before = self._buffers.copy()
        self._changes = torch.zeros(self._buffers.num_float_elements)
        self._rows: list[Tensor] = []
        self.entries: list[Entry] = []
        """Of each step, as far as this rank can tell of it."""

    def add(self, own: Tensor, grad_norm: float, num_workers: int, entry: Entry) -> None:
        """A step: the sum of the extras of so many virtual workers (training.arithmetic.extras), and the norm."""
        changes, rest = torch.split(own, [len(self._changes), len(own) - len(self._changes)])
        self._changes += changes
        self._rows.append(torch.cat([torch.tensor([grad_norm * num_workers]), rest]))
        self.entries.append(entry)

    def meet(self, virtual_workers: int) -> tuple[list[Entry], Control]:
        """The round's steps, as all ranks did them, and what they decided in the last one; buffers become what their
        changes make of them on average. Collective."""
        total = of_all_ranks(torch.cat([self._changes, *self._rows])).sum(dim=0)
        changes, rest = torch.split(total, [len(self._changes), len(total) - len(self._changes)])
        self._buffers.add_mean(self._before, changes / virtual_workers)
        rows = rest.view(len(self._rows), -1)
        means, words, entries = torch.split(rows, [2, NUM_CONTROL_WORDS, ledger.NUM_ENTRIES], dim=1)
        told = [
            {"loss": loss, "grad_norm": norm, "samples": ledger.seal(entry.numpy())}
            for (norm, loss), entry in zip((means / virtual_workers).tolist(), entries, strict=True)
        ]
        done = [replace(one, values={**values, **one.values}) for one, values in zip(self.entries, told, strict=True)]
        return done, Control.decided(words[-1].tolist())


class StaleTrainer(CheckpointTrainer):
    """Trains one run to its end: between two barriers there is no state that all ranks have come to. `train` is
    collective."""

    def __init__(self, *, servers: StaleServers, **arguments: Any) -> None:
        """All else as `Trainer` takes it."""
        super().__init__(**arguments)
        self._servers = self._maybe_attached = servers
        self.round = Round(self.state.model)
        self._wanted_barrier = 0
        """The step at which all meet since a rank wants the group to end; 0: there is none."""

    @property
    def _knows_its_pace(self) -> bool:
        """Whose share is how large stays as it is: nobody waits for a slow one in each step."""
        return False

    @cached_property
    def reducer(self) -> OwnGradients:
        objective = Objective(self.recipe, self.state.model, precision=self.preset.train.precision)
        return OwnGradients(objective, ranges(self.balance.shares)[self.rank.rank])

    def is_barrier(self, step: int) -> bool:
        """Whether all ranks wait for one another after that step: it may have to be saved, or judged."""
        train = self.preset.train
        periods = (train.checkpoint_every_steps, train.validate_every_steps or train.steps)
        return step in (train.steps, self._wanted_barrier) or any(step % every == 0 for every in periods)

    def train(self) -> None:
        """Resume, step to the end, checkpoint on the way, and commit the result."""
        self.resume()
        if self.state.step == 0:
            self.try_scores()
        fill_new_memory(True)
        while self.state.step < self.preset.train.steps:
            self.round = Round(self.state.model)
            self.go_to_barrier()
            control = self.meet()
            if self.state.step < self.preset.train.steps:
                self.after_step(control)
        self.finish()

    def begin_group(self) -> None:
        rank = self.rank
        with self.handover.waiting(), lost_with_a_peer():
            self._servers.begin(self.state, token=rank.token, rank=rank.rank, world_size=rank.world_size)

    def go_to_barrier(self) -> None:
        while True:
            self.require_survivable()
            self.own_step()
            fill_new_memory(False)  # it costs up to a tenth of a step
            self.tell(Note(event="step", step=self.state.step))
            if self.is_barrier(self.state.step):
                return

    def own_step(self) -> None:
        """Of this rank alone: the mean gradient of its virtual workers, an optimizer step of the servers', and the
        parameters for the next one."""
        started, waited = time.monotonic(), self.handover.waited_seconds
        self.state.require_same_parameters()
        self.hold_buffers()
        for worker in self.reducer.owned:
            self.virtual_worker_step(worker)
        workers_seconds = time.monotonic() - started
        own = self.reducer.finish()
        loss = self.extras.hand_out(own / len(self.reducer.owned))
        grad_norm = self.push()
        self.extras.release()
        self.handover.step = self.state.step = self.state.step + 1
        waited_seconds = self.handover.waited_seconds - waited
        seconds = time.monotonic() - started
        fixed_seconds = seconds - waited_seconds - workers_seconds
        self.pace.add(self.balance.seconds_at_even_shares(fixed_seconds, workers_seconds))
        self.count_step(loss, fixed_seconds, workers_seconds, waited_seconds)
        self.round.add(own, grad_norm, len(self.reducer.owned), self.entry(seconds))

    def push(self) -> float:
        """Returns the norm of the gradients, before they are clipped by it."""
        step, train = self.state.step, self.preset.train
        gradients = self.reducer.gradients()
        norm = norm_of(block_norms(gradients))
        if not math.isfinite(norm):
            self.figures.losses_not_finite += 1
            error = DeterministicError(f"step {step + 1}: the gradient norm is {norm}")
            raise self.explainer.of_workers(error, self.reducer.owned, self.state, self.extras)
        scale = learning_rate_scale(self.recipe, step, train.steps)
        self.state.set_learning_rate_scale(scale)
        own_scale = scale * len(self.reducer.owned) / train.virtual_workers  # all ranks' steps are one of that scale
        decision = Decision(
            grad_norm=norm, clip_norm=train.clip_norm, learning_rate_scale=own_scale, extras=torch.empty(0)
        )
        with self.handover.waiting(), lost_with_a_peer():
            self._wanted_barrier = self._servers.step(
                step + 1,
                gradients,
                decision,
                is_barrier=self.is_barrier(step + 1),
                wants_barrier=self.handover.wants_regroup or self.handover.wants_checkpoint,
            )
        return norm

    def entry(self, seconds: float) -> Entry:
        """What this rank can tell of the step that it has done."""
        values = {
            "learning_rate": float(self.state.optimizer.param_groups[0]["lr"]),
            "samples_per_second": self.preset.train.batch_size / seconds,
            "seconds": seconds,
            "validation": {},
        }
        return Entry(time=time.time(), step=self.state.step, values=values)

    def meet(self) -> Control:
        """All ranks have come to this step, and read the same; what they tell of the round's steps is noted."""
        with self.handover.waiting(), lost_with_a_peer():
            self.handover.journal, control = self.round.meet(self.preset.train.virtual_workers)
        self.maybe_validate()
        for entry in self.handover.journal:
            if self.maybe_events is not None:
                self.maybe_events.add_again(entry)
        self.handover.journal = []
        return control

    def wishes(self) -> Control:
        """At a barrier alone."""
        return super().wishes() if self.is_barrier(self.state.step + 1) else Control()

    @contextmanager
    def whole_state(self) -> Iterator[None]:
        """At a barrier, which nobody leaves before all have it."""
        with super().whole_state():
            with self.handover.waiting(), lost_with_a_peer():
                of_all_ranks(torch.zeros(1))
            yield
