"""The workers of a group: they meet, resume, make steps together, save checkpoints beside them, and finish."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from training.runs.record import (
    CheckpointRef,
    Departure,
    Record,
    Result,
    with_checkpoint,
    with_result,
    with_resume_step,
    with_retention,
)

if TYPE_CHECKING:
    from tests.simulation.agent import SimulatedAgent
    from tests.simulation.world import World

KEEP = 2
STALL = 4.0
"""After which a collective fails, if somebody does not take part."""
RETRY = 0.5
GRACE = 3.0
"""Within which a preempted group saves a checkpoint, or ends without."""
NUM_TORN = 0.25


class Memory(NamedTuple):
    """A whole state in a process's memory: after `step`, which the group of `token` made or took up."""

    token: int
    step: int


class Worker:
    """The worker process of one node in one group."""

    __slots__ = ("agent", "frozen", "group", "is_alive", "maybe_memory", "on_wake")
    group: Group

    def __init__(self, agent: SimulatedAgent, maybe_memory: Memory | None) -> None:
        self.agent = agent
        self.is_alive = True
        self.frozen = 0
        self.maybe_memory = maybe_memory
        self.on_wake: list[Callable[[], None]] = []

    @property
    def is_frozen(self) -> bool:
        return self.frozen > 0

    def wake(self) -> None:
        if not self.frozen and self.is_alive:
            calls, self.on_wake = self.on_wake, []
            for call in calls:
                self.agent.world.plan(0.5 * self.agent.world.random(), call)


class Group:
    """All workers of one token."""

    __slots__ = (
        "asked",
        "began_after",
        "has_met",
        "is_broken",
        "is_ending",
        "is_finishing",
        "is_running",
        "members",
        "num_done",
        "record",
        "resumed_at",
        "saving",
        "stalled_since",
        "step",
        "token",
        "workers",
        "world",
    )

    def __init__(self, world: World, record: Record) -> None:
        self.world = world
        self.record = record
        self.token = record.token
        self.members = tuple(member.incarnation for member in record.members)
        self.workers: dict[str, Worker] = {}
        self.began_after = len(world.fired)
        """So many faults."""
        self.has_met = False
        self.is_running = False
        """It resumed: a step comes next."""
        self.is_broken = False
        self.is_finishing = False
        """No step comes any more."""
        self.asked = ""
        """For what all end together after the next step."""
        self.is_ending = False
        """They do."""
        self.step = -1
        self.num_done = 0
        """Steps that it made itself."""
        self.resumed_at = -1
        self.saving = False
        self.stalled_since = world.agenda.now
        world.plan(world.step_seconds, self._go_on)

    @property
    def maybe_first(self) -> Worker | None:
        """Rank 0, while it lives."""
        worker = self.workers.get(self.members[0])
        return worker if worker is not None and worker.is_alive else None

    def join(self, worker: Worker) -> None:
        worker.group = self
        self.workers[worker.agent.name] = worker

    def lost(self, worker: Worker) -> None:
        """Its peers' collectives fail, if they get to know; those that only wait for their end do not care."""
        self.is_broken = True
        if not self.has_met or self.is_ending or (self.is_finishing and worker.agent.name != self.members[0]):
            return
        world = self.world
        if not self.is_finishing and self.is_running and world.random() < NUM_TORN:
            self._tear()
        for other in self.workers.values():
            if other.is_alive and world.network.is_open(worker.agent.host, other.agent.host):
                self._fail(other, "PeerLost", "a peer is gone")

    def _tear(self) -> None:
        """Some had the step already that was being made."""
        for worker in self.workers.values():
            if worker.is_alive and not worker.is_frozen and self.world.random() < 0.5:
                worker.maybe_memory = Memory(self.token, self.step + 1)

    def _fail(self, worker: Worker, kind: str, cause: str) -> None:
        departure = Departure(
            token=self.token, node=worker.agent.number, cause=cause, step=max(self.step, 0), class_name=kind
        )
        self.world.plan(0.05 + 0.4 * self.world.random(), worker.agent.worker_ends, worker, departure)

    def ask(self, to: str) -> None:
        """Whoever wants a checkpoint gets it, whatever the others want."""
        if self.asked != "preempt":
            self.asked = to

    def kill(self, worker: Worker) -> None:
        departure = Departure(
            token=self.token, node=worker.agent.number, cause="killed", step=max(self.step, 0), class_name="Killed"
        )
        worker.agent.worker_ends(worker, departure, is_killed=True)

    def report(self, worker: Worker, kind: str) -> None:
        """The recipe raised, say."""
        self.is_broken = True
        self._fail(worker, kind, f"{kind} in step {self.step + 1}")

    # ---- from one step to the next -------------------------------------------------------------------------------

    def _go_on(self) -> None:
        living = [worker for worker in self.workers.values() if worker.is_alive]
        if not living and (self.is_broken or self.world.agenda.now - self.stalled_since > 2 * STALL):
            return
        if not self.is_finishing:
            if self._can_go_on(living):
                self.stalled_since = self.world.agenda.now
                self._advance()
            elif self.world.agenda.now - self.stalled_since > (STALL if self.has_met else 2 * STALL):
                self.is_broken = True
                for worker in living:
                    self._fail(worker, "PeerLost", "a collective took too long")
        self.world.plan(self.world.step_seconds, self._go_on)

    def _can_go_on(self, living: list[Worker]) -> bool:
        if len(living) < len(self.members) or self.is_broken:
            return False
        for number, worker in enumerate(living):
            if worker.frozen:
                return False
            for other in living[:number]:
                if not self.world.network.is_open(worker.agent.host, other.agent.host):
                    return False
        return True

    def _advance(self) -> None:
        if not self.has_met:
            self.has_met = True
            self._resume()
        elif self.is_running:
            self._make_step()

    def _resume(self) -> None:
        """At the highest step in memory or in the record (memory/handover.py); the record notes it first."""
        if self.maybe_first is not None:
            self._ask_store(self._note_resume, self._resumed, self._resume)

    def _note_resume(self, record: Record) -> Record:
        record.require_token(self.token)
        return with_resume_step(record, self.highest(record), token=self.token)

    def highest(self, record: Record) -> int:
        memories = [worker.maybe_memory.step for worker in self.workers.values() if worker.maybe_memory]
        return max([0, *memories, *(checkpoint.step for checkpoint in record.checkpoints)])

    def _resumed(self, record: Record | None) -> None:
        if record is None or self.is_broken:
            return
        self.step = self.resumed_at = self.highest(record)
        self.world.invariants.on_resume(self, record)
        for worker in self.workers.values():
            worker.maybe_memory = Memory(self.token, self.step)
        self.is_running = True
        if self.step >= self.world.num_steps:
            self._finish()

    def _make_step(self) -> None:
        self.step += 1
        self.num_done += 1
        for worker in self.workers.values():
            worker.maybe_memory = Memory(self.token, self.step)
        self.world.invariants.on_step(self)
        if self.step >= self.world.num_steps:
            self._finish()
        elif self.asked == "preempt":
            self.is_finishing = True
            self.world.plan(GRACE, self._end_together)
            self._ask_store(lambda record: self._named(record, self.step), self._end_together, self._end_together)
        elif self.asked:
            self.is_finishing = True
            self._end_together()
        elif self.step % self.world.save_every == 0 and not self.saving:
            self.saving = True
            self.world.plan(0.1 + self.world.random(), self._name_checkpoint, self.step)

    def _end_together(self, _: Record | None = None) -> None:
        if not self.is_ending:
            self.is_ending = True
            for worker in self.workers.values():
                self.world.plan(0.2 * self.world.random(), worker.agent.worker_ends, worker)

    # ---- what rank 0 commits -------------------------------------------------------------------------------------

    def _ask_store(
        self,
        change: Callable[[Record], Record],
        done: Callable[[Record | None], None],
        again: Callable[[], None],
    ) -> None:
        """As rank 0, which may be frozen, dead or fenced off by the time of the answer."""
        maybe_worker = self.maybe_first
        if maybe_worker is None:
            return
        worker = maybe_worker

        def answered(maybe_record: Record | None) -> None:
            if not worker.is_alive:
                return
            if worker.frozen:
                worker.on_wake.append(lambda: answered(maybe_record))
            elif maybe_record is None:
                self.world.plan(RETRY, again)
            else:
                done(maybe_record)

        def fenced(_: Record | None) -> None:
            self.world.count_fenced()
            self._fail(worker, "FencedError", "fenced off")

        if worker.frozen:
            worker.on_wake.append(again)
            return
        self.world.store.ask(worker.agent.host, change, answered, token=self.token, on_fence=fenced)

    def _name_checkpoint(self, step: int) -> None:
        """It was written and read back; a zombie fault may stop rank 0 here, and wake it much later."""
        maybe_worker = self.maybe_first
        if maybe_worker is not None and self.world.zombies:
            self.world.freeze_zombie(maybe_worker)

        def saved(_: Record | None) -> None:
            self.saving = False

        self._ask_store(lambda record: self._named(record, step), saved, lambda: self._name_checkpoint(step))

    def _named(self, record: Record, step: int) -> Record:
        reference = CheckpointRef(step=step, token=self.token, sha256=f"{step}")
        return with_retention(with_checkpoint(record, reference), token=self.token, keep=KEEP)

    def _finish(self) -> None:
        """The last checkpoint, then the result; rank 0 goes last."""
        self.is_finishing = True
        self._ask_store(lambda record: self._named(record, self.step), self._commit_result, self._finish)

    def _commit_result(self, _: Record | None) -> None:
        reference = CheckpointRef(step=self.step, token=self.token, sha256=f"{self.step}")
        result = Result(step=self.step, weights_sha256="w", state_sha256="s", checkpoint=reference)
        self._ask_store(
            lambda record: with_result(record, result, token=self.token),
            self._leave_together,
            lambda: self._commit_result(None),
        )

    def _leave_together(self, _: Record | None) -> None:
        for worker in self.workers.values():
            is_first = worker.agent.name == self.members[0]
            delay = (0.5 if is_first else 0.0) + 0.4 * self.world.random()
            self.world.plan(delay, worker.agent.worker_ends, worker, None, False, True)
