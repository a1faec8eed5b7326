"""The training loop of one rank."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial

import torch
from torch import Tensor

from training.arithmetic.balance import Balance, ranges
from training.arithmetic.collectives import of_all_ranks
from training.arithmetic.exact import ExactReducer
from training.arithmetic.extras import NUM_CONTROL_WORDS, Control, Extras
from training.arithmetic.fast import FastReducer
from training.arithmetic.objective import Objective, fill_new_memory, recipe_errors, seed_streams, stream_seed
from training.arithmetic.validation import HeldOut, validate
from training.beside import beside
from training.checkpointing import Checkpointing
from training.checkpoints.checkpoint import load_initial, newest_proven
from training.checkpoints.saver import CheckpointSaver
from training.checkpoints.state import TrainState
from training.checkpoints.trust import signed_result
from training.config import Preset
from training.control import Note
from training.data import ledger
from training.data.stream import Microbatch
from training.diagnosis.crashes import Crashes
from training.diagnosis.explain import Explainer, on_device
from training.diagnosis.poison import Samples
from training.errors import DeterministicError
from training.memory.handover import GroupEnded, Handover
from training.recipe import Recipe, learning_rate_scale
from training.runs.events import Entry, EventWriter, json_number
from training.runs.failures import crash_to_explain
from training.runs.figures import Figures
from training.runs.pace import Pace, Straggler, maybe_straggler
from training.runs.record import CheckpointRef, InitialWeights, Record, Result, RunRecord, with_result, with_resume_step
from training.servers.attached import Attached
from training.servers.colocated import Colocated
from training.servers.placement import num_computing
from training.servers.reducer import ServedReducer
from training.step import Feed, LocalUpdate, Rank, Reducer, StepOutcome, Update, digest_period, lost_with_a_peer


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
        record: Record,
        saver: CheckpointSaver,
        events: EventWriter | None,
        rank: Rank,
        state: TrainState | None = None,
        handover: Handover | None = None,
        tell: Callable[[Note], None] = lambda note: None,
        crashes: Crashes | None = None,
        servers: Colocated | None = None,
    ) -> None:
        """`record` is the run's as the group began. `state` is a new one, or that of the group before, which `handover`
        knows. `tell` hears how far this rank has come. `crashes` finds what killed ranks before. `servers`
        make the optimizer's steps in its place."""
        self.preset = preset
        self.recipe = recipe
        self.feed = feed
        self._maybe_microbatches: Iterator[Microbatch] | None = None
        self.initial = initial
        self.run = run
        self.saver = saver
        self.maybe_events = events
        self.rank = rank
        self.handover = handover or Handover()
        self.tell = tell
        self.explainer = Explainer(recipe, preset, feed, handover=self.handover, device=rank.device)
        self.state = state or self.new_state()
        self.pace = Pace()
        self.figures = self.handover.figures = Figures()
        self._nodes = [member.node for member in record.members]
        """Ranks follow their order."""
        self.balance = self.new_balance()
        self._maybe_crashes = crashes
        self._maybe_servers = servers
        self._maybe_attached: Attached | None = servers
        """In this mode or another."""
        self._maybe_suspect_step = crash_to_explain(record)
        """After which ranks died twice alike."""
        self._maybe_failure: tuple[int, DeterministicError] | None = None
        """A virtual worker's, for which the step goes on to where all ranks find that it failed."""
        self._maybe_broken: str | None = None
        """What kept this rank from computing a virtual worker with others, likewise."""
        self.checkpoints = Checkpointing(
            preset.train,
            saver=saver,
            handover=self.handover,
            emit=self.emit,
            committed_step=record.checkpoints[-1].step if record.checkpoints else 0,
        )

    def new_state(self) -> TrainState:
        return TrainState(self.recipe, seed=self.preset.seed, device=self.rank.device)

    def new_balance(self) -> Balance:
        launch, rank = self.preset.launch, self.rank
        return Balance(
            self.preset.train.virtual_workers,
            rank=rank.rank,
            world_size=rank.world_size,
            over_seconds=launch.balance_seconds if self._knows_its_pace else 0.0,
            num_computing=num_computing(self._nodes_of_ranks, launch.server_nodes),
        )

    @property
    def _knows_its_pace(self) -> bool:
        """Whether a rank waits for others only after its virtual workers: DistributedDataParallel waits as it goes
        back, and a GPU may still be at work when its process waits."""
        return self.preset.train.mode == "exact" and self.rank.device.type == "cpu"

    @cached_property
    def extras(self) -> Extras:
        return Extras(
            self.state.model,
            num_words=NUM_CONTROL_WORDS + self.balance.num_words,
            with_counters=0 in self.balance.shares,
        )

    @cached_property
    def digest_period(self) -> int:
        return digest_period(self.preset.train, self.state.num_weight_bytes())

    @cached_property
    def reducer(self) -> Reducer:
        train = self.preset.train
        objective = Objective(self.recipe, self.state.model, precision=train.precision)
        owned, rank = ranges(self.balance.shares), self.rank.rank
        if train.mode == "fast":
            return FastReducer(objective, ranges=owned, rank=rank)
        num_extras = self.extras.num_elements
        if self._maybe_servers is None:
            return ExactReducer(objective, num_extras=num_extras, ranges=owned, rank=rank)
        return ServedReducer(
            objective,
            self._maybe_servers,
            num_extras=num_extras,
            ranges=owned,
            rank=rank,
            next_step=lambda: self.state.step + 1,
            say=lambda: self.extras.said(self.wishes().words()),
        )

    @property
    def share(self) -> float:
        """Of a step's samples, for whoever watches: what this rank computes."""
        return len(self.reducer.owned) / self.preset.train.virtual_workers

    @property
    def tried_workers(self) -> Sequence[int]:
        """The virtual workers that this rank tries again by itself, if a step failed."""
        return self.reducer.owned

    @cached_property
    def held_out(self) -> HeldOut:
        return self.feed.held_out()

    @property
    def updater(self) -> Update:
        return self._maybe_servers or LocalUpdate(self.state, clip_norm=self.preset.train.clip_norm)

    def train(self) -> None:
        """Resume, step to the end, checkpoint on the way, and commit the result."""
        self.resume()
        if self.state.step == 0:
            self.try_scores()
        config = self.preset.train
        maybe_reserving = None
        fill_new_memory(True)  # with NaN: a recipe that reads it, and has other bits each time, is found in one step
        while self.state.step < config.steps:
            self.require_survivable()
            outcome = self.train_step()
            fill_new_memory(False)  # it costs up to a tenth of a step
            self.report_step(outcome)
            maybe_reserving = maybe_reserving or beside(self.handover.reserve)  # now that all its tensors are there
            if self.state.step < config.steps:
                self.after_step(outcome.control)
        self.finish()

    def resume(self) -> None:
        """Take up what a rank has in memory, or the newest proven checkpoint, or begin at step 0, as a rule with new
        weights; rank 0 notes which."""
        since = self.checkpoints.committed_step
        found = self.handover.find(since=since)
        if self._maybe_servers is not None:
            self.handover.find_servers(self._maybe_servers)
            if not self._maybe_servers.can_go_on(found.step if found else None, nodes=self._nodes_of_ranks):
                found = None
        if self.handover.has_kept and not (found is not None and found.is_here):
            self.state = self.new_state()  # nothing of another step may stay, and that one may still be asked for
        journal: Sequence[Entry] = ()
        if found is not None:
            noting = beside(partial(self.note_resumption, since))
            self.begin_reading(found.step)
            journal = [entry for entry in found.take(self.state) if entry.step > since]
        else:
            since = self.load_checkpoint()
            self.saver.require_agreement(since)
            noting = beside(partial(self.note_resumption, since))
            self.begin_reading(since)
        noting.result()
        self.checkpoints.committed_step = since
        if self._maybe_servers is not None:
            rank = self.rank
            self._maybe_servers.begin(self.state, token=rank.token, rank=rank.rank)
        self.handover.keep(self.settled_state, journal, servers=self._maybe_servers)
        self.handover.step = self.state.step
        self.tell_history(source="memory" if found is not None else "checkpoint" if since else "start")
        self.tell(Note(event="began", step=self.state.step))

    def note_resumption(self, step: int) -> None:
        """In the record, that steps after this one are told of by this group."""
        token = self.rank.token
        if self.rank.rank == 0:
            self.run.update(lambda newest: with_resume_step(newest, step, token=token))

    def begin_reading(self, step: int) -> None:
        """The samples of that step and those after it."""
        if step < self.preset.train.steps and self.reducer.owned:
            self.require_readable(step)
            self._maybe_microbatches = self.feed.microbatches(workers=self.reducer.owned, step=step)

    def require_readable(self, step: int) -> None:
        """If ranks died twice alike: that none dies of what it decodes."""
        if self._maybe_crashes is not None and self._maybe_suspect_step is not None:
            with self.handover.waiting():
                self._maybe_crashes.require_readable(self.reducer.owned, step, self._maybe_suspect_step)

    def require_survivable(self) -> None:
        """If ranks died twice alike in the step to come: that none does again."""
        if self._maybe_crashes is not None and self.state.step == self._maybe_suspect_step:
            with self.whole_weights(), self.handover.waiting():
                self._maybe_crashes.require_survivable(self.tried_workers, self.state.step, self.state.tensors())

    def load_checkpoint(self) -> int:
        """The newest proven checkpoint, or the initial weights. Returns the step."""
        found = newest_proven(self.run, token=self.rank.token)
        if found is not None:
            reference, tensors = found
            self.state.load(tensors, step=reference.step)
        elif self.initial is not None:
            self.state.load_weights(load_initial(self.run.store, self.initial))
        return self.state.step

    def tell_history(self, *, source: str) -> None:
        """Tell again of the steps that only memory holds: whoever told of them before may have died with his words."""
        if self.handover.journal and "validation" not in self.handover.journal[-1].values:
            self.maybe_validate()
        for entry in self.handover.journal:
            if self.maybe_events is not None:
                self.maybe_events.add_again(entry)
        self.emit("attempt", world_size=self.rank.world_size, resumed_from=self.state.step, source=source)

    def settled_state(self) -> tuple[int, Mapping[str, Tensor]]:
        """The last finished step and its tensors, also in the midst of the next."""
        tensors = dict(self.state.tensors())
        for name, value in self.extras.settled().items():
            key = f"model.{name}" if f"model.{name}" in tensors else f"buffer.{name}"
            if key in tensors:
                tensors[key] = value
        return self.state.step, tensors

    def train_step(self) -> StepOutcome:
        """One synchronous step: each owned virtual worker's gradient, the mean over all ranks, one optimizer step."""
        started, waited = time.monotonic(), self.handover.waited_seconds
        self.state.require_same_parameters()
        self.hold_buffers()
        self.compute()
        workers_seconds = time.monotonic() - started - (self.handover.waited_seconds - waited)
        with self.handover.waiting():
            total = self.reduce()
        with self.handover.update():
            outcome = self.update(total)
            self.handover.note(self.state.step, self.values(outcome, seconds=time.monotonic() - started))
            self.extras.release()
        self.handover.forget(outcome.control.committed_step)
        outcome = replace(outcome, validation=self.maybe_validate())
        waited_seconds = self.handover.waited_seconds - waited
        fixed_seconds = time.monotonic() - started - waited_seconds - workers_seconds
        self.pace.add(self.balance.seconds_at_even_shares(fixed_seconds, workers_seconds))
        self.count_step(outcome.loss, fixed_seconds, workers_seconds, waited_seconds)
        self.balance.hear(self.extras.other_words(total))
        self.balance.note(fixed_seconds, workers_seconds)
        return outcome

    def compute(self) -> None:
        """Gradients of this rank's virtual workers, to be summed."""
        for worker in self.reducer.owned:
            self.virtual_worker_step(worker)

    def count_step(self, loss: float, fixed_seconds: float, workers_seconds: float, waited_seconds: float) -> None:
        """For whoever watches."""
        figures = self.figures
        figures.steps += 1
        figures.samples += self.share * self.preset.train.batch_size
        figures.loss = loss
        figures.outside_seconds += fixed_seconds + workers_seconds
        figures.pace_seconds += self.pace.seconds[-1]
        figures.collective_seconds += waited_seconds

    def reduce(self) -> Tensor:
        """The sums over all virtual workers. Raises `GroupLost` if another rank does not give its part."""
        with lost_with_a_peer():
            return self.reducer.finish()

    def let_go(self) -> None:
        """After `GroupOver`: the state is whole, and may be trained further in another group by another Trainer."""
        with self.handover.standstill():
            self.extras.take_back()
        self.lay_down_workers()
        self.checkpoints.abandon()
        if self.maybe_events is not None:
            self.maybe_events.abandon()

    def lay_down_workers(self) -> None:
        """No more of what has been begun for this rank's virtual workers."""
        self.reducer.close()
        if isinstance(self._maybe_microbatches, Generator):
            beside(self._maybe_microbatches.close)  # its threads may be busy

    def hold_buffers(self) -> None:
        """Before they change. Whoever copies the state just now began with those that are there."""
        with self.handover.standstill():
            self.extras.hold()

    def update(self, total: Tensor) -> StepOutcome:
        """From the sums over all virtual workers to the next state, without a word to any other rank (unless they are
        not finite, and it is over)."""
        step = self.state.step
        loss = self.extras.hand_out(total / self.preset.train.virtual_workers)
        if not self.reducer.owned:
            self.extras.take_counters(total)
        grad_norm = self.updater.clip()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self.figures.losses_not_finite += 1
            error = DeterministicError(f"step {step + 1}: the loss is {loss}, the gradient norm {grad_norm}")
            worker, maybe_own = self._maybe_failure or (None, None)
            suspects = self.tried_workers if worker is None else [worker]
            with self.whole_weights():
                raise self.explainer.of_ranks(
                    error, suspects, self.state, self.extras, maybe_own=maybe_own, maybe_broken=self._maybe_broken
                )
        scale = learning_rate_scale(self.recipe, step, self.preset.train.steps)
        self.state.set_learning_rate_scale(scale)
        with recipe_errors(f"step {step + 1}, optimizer.step()"):
            self.updater.apply()
        self.state.step = step + 1
        return StepOutcome(
            loss=loss,
            grad_norm=grad_norm,
            samples=self.extras.ledger_line(total),
            control=self.extras.control(total),
        )

    def wishes(self) -> Control:
        """What this rank has to say to the others, as late in a step as it can still be said."""
        is_first = self.rank.rank == 0
        return Control(
            regroup=self.handover.wants_regroup,
            checkpoint_and_regroup=self.handover.wants_checkpoint,
            checkpoint=is_first and self.checkpoints.may_begin(self.state.step + 1),
            committed_step=self.checkpoints.committed_step if is_first else 0,
        )

    def after_step(self, control: Control) -> None:
        """What the ranks decided."""
        if control.checkpoint:
            self.compare_pace()
            with self.whole_state():
                self.checkpoints.begin(self.state)
        if control.checkpoint_and_regroup:
            end = self.handover.maybe_must_end_at or time.monotonic() + self.preset.launch.grace_seconds
            with self.whole_state():
                self.checkpoints.save_in_time(self.state, end, is_begun=control.checkpoint)
        if control.regroup or control.checkpoint_and_regroup:
            raise GroupEnded
        self.rebalance()

    @contextmanager
    def whole_state(self) -> Iterator[None]:
        """Meanwhile the state has what the servers keep. All ranks must ask for it after the same step."""
        servers = self._maybe_attached
        if servers is None:
            yield
            return
        with self.handover.waiting(), lost_with_a_peer():
            entries = servers.optimizer_entries()
        with self.handover.standstill():
            self.state.optimizer.state.update(entries)
        yield
        with self.handover.standstill():
            self.state.optimizer.state.clear()

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Meanwhile this rank can read all weights, and compute the model. All ranks must ask for it after the same
        step."""
        yield

    def rebalance(self) -> None:
        """Compute other virtual workers from here on, if the ranks' paces say so. All do so after the same step."""
        maybe_change = self.balance.maybe_change()
        if maybe_change is None:
            return
        seconds = [each for _, each in maybe_change.seconds.tolist()]
        self.emit("balance", shares=maybe_change.shares, before=maybe_change.before, worker_seconds=seconds)
        self.lay_down_workers()
        del self.reducer  # another is made when it is asked for
        self.begin_reading(self.state.step)

    def compare_pace(self) -> None:
        """Since the last time: how long a step takes each rank without waiting, if it has as many virtual workers as
        the others, and who is slow."""
        with self.handover.waiting(), lost_with_a_peer():
            mine = torch.tensor([self.pace.take_median()], dtype=torch.float64)
            outside: list[float] = of_all_ranks(mine).flatten().tolist()
        slow = self.straggler(outside) if self.preset.train.mode == "exact" else None  # DDP waits as it goes back
        self.emit("pace", outside_seconds=outside, straggler=slow and self.named(slow))

    def straggler(self, outside_seconds: Sequence[float]) -> Straggler | None:
        """Of all ranks that compute."""
        return maybe_straggler(outside_seconds[: self.balance.num_computing])

    def named(self, slow: Straggler) -> dict[str, object]:
        """With its node: ranks follow the order of nodes."""
        return {"rank": slow.rank, "node": self._nodes_of_ranks[slow.rank], "factor": slow.factor}

    @property
    def _nodes_of_ranks(self) -> list[int]:
        places = [rank // self.preset.launch.processes_per_node for rank in range(self.rank.world_size)]
        return [self._nodes[place] if place < len(self._nodes) else place for place in places]

    def try_scores(self) -> None:
        """Judge one batch, as is done after training: what is wrong with that should not be found out only then."""
        self.validate(max_samples=self.preset.evaluate.batch_size, alone=True)

    def validate(self, *, max_samples: int | None, alone: bool = False) -> Mapping[str, float]:
        """Held-out scores; of all ranks together, unless each does it `alone`."""
        self.hold_buffers()
        with lost_with_a_peer(), self.whole_weights():
            scores = validate(
                self.recipe,
                self.state.model,
                self.held_out,
                batch_size=self.preset.evaluate.batch_size,
                max_samples=max_samples,
                rank=0 if alone else self.rank.rank,
                world_size=1 if alone else self.rank.world_size,
                waiting=self.handover.waiting,
            )
        self.extras.release()
        return scores

    def maybe_validate(self) -> Mapping[str, float]:
        """Held-out scores, every so many steps."""
        every = self.preset.train.validate_every_steps
        scores: Mapping[str, float] = {}
        if every is not None and self.state.step % every == 0:
            scores = self.validate(max_samples=self.preset.evaluate.max_samples)
        self.handover.complete(validation={name: json_number(mean) for name, mean in scores.items()})
        return scores

    def virtual_worker_step(self, worker: int) -> None:
        """Forward and backward of one virtual worker's microbatch."""
        if self._maybe_attached is not None:
            with lost_with_a_peer():
                self._maybe_attached.require_group()
        ids, batch = self.microbatch(worker)
        self.extras.begin_worker()
        seed_streams(stream_seed(self.preset.seed, self.state.step, worker), self.rank.device)
        try:
            with recipe_errors(f"step {self.state.step + 1}, virtual worker {worker}", ids):
                loss = self.reducer.forward(worker, batch)
                self.require_finite(loss, worker, ids)
                is_last = worker == self.reducer.owned[-1]
                words = [*self.wishes().words(), *self.balance.words()] if is_last else ()
                tells_counters = is_last and self.rank.rank == 0
                told = self.extras.gather(loss.detach(), words, ledger.entries(worker, ids), tells_counters)
                self.reducer.backward(worker, loss, told)
        except DeterministicError as error:
            self.fail(error, worker, (ids, batch))

    def require_finite(self, loss: Tensor, worker: int, ids: Sequence[str]) -> None:
        """Raises `DeterministicError`."""
        if not math.isfinite(value := loss.item()):
            self.figures.losses_not_finite += 1
            raise DeterministicError(
                f"step {self.state.step + 1}, virtual worker {worker}: the loss is {value};"
                f" samples {', '.join(ids[:8])}{', …' if len(ids) > 8 else ''}"
            )

    def fail(self, error: DeterministicError, worker: int, samples: Samples) -> None:
        """For what a virtual worker's microbatch made of its step. Raises what replays find out."""
        found = self.explainer.of_worker(error, worker, samples, self.state, self.extras)
        raise found or RuntimeError(str(error)) from error

    def microbatch(self, worker: int) -> tuple[Sequence[str], Mapping[str, Tensor]]:
        """Ids and tensors of the next microbatch, which is `worker`'s own of this step."""
        if self._maybe_microbatches is None:
            self.begin_reading(self.state.step)
        assert self._maybe_microbatches is not None
        asked = time.monotonic()
        batch = next(self._maybe_microbatches)
        self.figures.data_wait_seconds += time.monotonic() - asked
        assert (batch.step, batch.worker) == (self.state.step, worker)
        return batch.ids, on_device(batch, self.rank.device)

    def values(self, outcome: StepOutcome, *, seconds: float) -> dict[str, object]:
        """What is told of a step, but for its validation."""
        told: dict[str, object] = {
            "loss": outcome.loss,
            "grad_norm": outcome.grad_norm,
            "samples": outcome.samples,
            "learning_rate": float(self.state.optimizer.param_groups[0]["lr"]),
            "samples_per_second": self.preset.train.batch_size / seconds,
            "seconds": seconds,
        }
        if self.digest_period and self.state.step % self.digest_period == 0:
            with self.whole_weights():
                told["weights"] = self.state.weights_digest()
        return told

    def report_step(self, outcome: StepOutcome) -> None:
        if self.maybe_events is not None:
            self.maybe_events.add_again(self.handover.journal[-1])
        self.tell(Note(event="step", step=self.state.step))

    def finish(self) -> None:
        """Prove the last state, then commit the result."""
        with self.whole_state():
            self.commit_result(self.checkpoints.prove_last(self.state))

    def commit_result(self, maybe_last: CheckpointRef | None) -> None:
        """Only rank 0 speaks to the record."""
        if self.rank.rank == 0:
            assert maybe_last is not None
            assert self.maybe_events is not None
            result = Result(
                step=self.state.step,
                weights_sha256=self.state.weights_sha256(),
                state_sha256=self.state.state_sha256(),
                checkpoint=maybe_last,
                inexact=self.preset.train.maybe_inexact,
            )
            self.emit("finished")
            self.maybe_events.close()
            self.run.update(
                lambda record: with_result(
                    record, signed_result(self.run.prefix(record), result), token=self.rank.token
                )
            )

    def emit(self, kind: str, *, step: int | None = None, **values: object) -> None:
        """Of a step, or of the last finished one."""
        if self.maybe_events is not None:
            self.maybe_events.add(kind, step=self.state.step if step is None else step, **values)
