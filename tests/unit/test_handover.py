"""What a rank leaves in memory: the last finished step, at whatever moment it is asked; and how it is taken up."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from torch import Tensor, nn

from tests.unit.attempts import attempt, history, step_through, train
from tests.unit.tiny import Tiny, exact_arithmetic, make_trainer, tiny_preset
from training import tensorfile
from training.arithmetic.extras import Control
from training.checkpoints.checkpoint import folder
from training.checkpoints.state import tensors_sha256
from training.control import Note
from training.loop import Trainer
from training.memory import handover as handover_module
from training.memory.handover import GroupEnded, Handover
from training.memory.slots import Slots, create_slots, file_of
from training.runs.events import Entry, EventReader
from training.runs.record import RunRecord
from training.s3.objectstore import Store

STEPS = 9


@pytest.fixture
def run(store: Store) -> RunRecord:
    record = RunRecord(store, "k")
    record.create_if_missing()
    return record


def begin(run: RunRecord, slots: Slots, *, token: int, **preset: object) -> Trainer:
    handover = Handover(slots, run_key="k", generation=0)
    return attempt(run, token=token, handover=handover, steps=STEPS, **preset)


def train_until(trainer: Trainer, step: int) -> None:
    """To the end of that step, as an agent wants it."""
    after_step = trainer.after_step

    def watch(control: Control) -> None:
        trainer.handover.wants_regroup = trainer.state.step >= step - 1
        after_step(control)
        trainer.saver.wait()

    trainer.handover.wants_regroup = step == 1
    trainer.after_step = watch  # type: ignore[method-assign]
    with pytest.raises(GroupEnded):
        train(trainer)
    trainer.handover.leave()
    assert trainer.state.step == step


def attempts(run: RunRecord) -> list[tuple[int, int, str]]:
    """Token, step and source of each."""
    record = run.read()
    events = EventReader(run.store, run.prefix(record)).read_new(newest_token=record.token)
    return [(event.token, event.step, event.values["source"]) for event in events if event.kind == "attempt"]


def calm_sha256() -> str:
    return step_through(make_trainer(preset=tiny_preset(steps=STEPS)), STEPS).state.state_sha256()


class Interrupted(Tiny):
    """Calls back in the midst of a microbatch, when buffers have changed already."""

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        found = super().loss(model, batch)
        CALLS[0]()
        return found

    def scores(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for buffer in model.buffers():
            buffer.add_(1)
        CALLS[0]()
        return super().scores(model, batch)


CALLS = [lambda: None]


def test_in_the_midst_of_a_step_the_state_is_that_of_the_step_before() -> None:
    trainer = step_through(make_trainer(recipe=Interrupted()), 2)
    before = trainer.state.state_sha256()
    seen: list[tuple[int, str, str]] = []

    def look() -> None:
        step, tensors = trainer.settled_state()
        seen.append((step, tensors_sha256(tensors), trainer.state.state_sha256()))

    CALLS[0] = look
    with exact_arithmetic():
        trainer.train_step()
    CALLS[0] = lambda: None
    assert len(seen) == tiny_preset().train.virtual_workers
    assert {(step, sha256) for step, sha256, _ in seen} == {(2, before)}
    assert any(live != before for _, _, live in seen), "the live buffers were others"
    assert tensors_sha256(trainer.settled_state()[1]) == trainer.state.state_sha256() != before


@pytest.mark.parametrize("step", range(1, STEPS))
def test_the_next_group_goes_on_where_the_one_before_stood(run: RunRecord, slots: Slots, step: int) -> None:
    """Between checkpoints, which are of every second step, and at one."""
    train_until(begin(run, slots, token=1), step)
    train(begin(run, slots, token=2))
    record = run.read()
    assert record.result is not None
    assert record.result.state_sha256 == calm_sha256()
    assert attempts(run)[-1] == (2, step, "memory")
    assert history(run) == list(range(1, STEPS + 1))


def test_who_told_of_steps_may_die_before_the_store_has_heard(run: RunRecord, slots: Slots) -> None:
    first = begin(run, slots, token=1, checkpoint_every_steps=100)
    assert first.maybe_events is not None
    first.maybe_events.flush = lambda: None  # type: ignore[method-assign]
    train_until(first, 5)
    assert history(run) == []
    train(begin(run, slots, token=2, checkpoint_every_steps=100))
    assert history(run) == list(range(1, STEPS + 1))
    assert attempts(run) == [(2, 5, "memory")]


def test_a_checkpoint_that_is_newer_than_memory_is_taken(run: RunRecord, slots: Slots) -> None:
    train_until(begin(run, slots, token=1), 3)
    elsewhere = create_slots()
    train_until(begin(run, Slots(elsewhere), token=2), 7)
    train(begin(run, slots, token=3))
    assert attempts(run)[-1] == (3, 6, "checkpoint")
    assert history(run) == list(range(1, STEPS + 1))
    for fd in elsewhere:
        os.close(fd)


def test_a_checkpoint_that_is_taken_has_no_journal_before_it(run: RunRecord, slots: Slots) -> None:
    """A process that stayed knows steps of a later state, which is not found any more."""
    train_until(begin(run, slots, token=1), 3)
    elsewhere = create_slots()
    trainer = begin(run, Slots(elsewhere), token=2)
    trainer.handover.journal = [Entry(time=0.0, step=step, values={}) for step in (4, 5)]
    with exact_arithmetic():
        trainer.resume()
    assert trainer.state.step == 2
    assert trainer.handover.journal == []
    for fd in elsewhere:
        os.close(fd)


def test_a_preempted_group_leaves_a_checkpoint_of_its_last_step(run: RunRecord, slots: Slots) -> None:
    trainer = begin(run, slots, token=1, checkpoint_every_steps=100)
    trainer.handover.wants_checkpoint = True
    with pytest.raises(GroupEnded):
        train(trainer)
    (checkpoint,) = run.read().checkpoints
    assert checkpoint.step == trainer.state.step == 1
    assert run.store.exists(folder("runs/k/0/", 1, 1) + "manifest.json")


def test_an_update_that_failed_leaves_nothing(run: RunRecord, slots: Slots) -> None:
    trainer = begin(run, slots, token=1)
    step = trainer.state.optimizer.step

    def fail() -> None:
        step()
        raise RuntimeError("the optimizer broke")

    trainer.state.optimizer.step = fail  # type: ignore[assignment]
    with pytest.raises(Exception, match="the optimizer broke"):
        train(trainer)
    trainer.handover.leave()
    assert slots.newest("k", 0) is None


def test_an_update_that_does_not_end_leaves_nothing(slots: Slots, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover_module, "LOCK_SECONDS", 0.01)
    handover = Handover(slots, run_key="k", generation=0)
    handover.keep(lambda: (3, {}))
    begun, ended = threading.Event(), threading.Event()

    def update() -> None:
        with handover.update():
            begun.set()
            ended.wait(120)

    thread = threading.Thread(target=update)
    thread.start()
    assert begun.wait(120)
    handover.leave()
    assert slots.newest("k", 0) is None
    ended.set()
    thread.join()
    handover.leave()
    assert slots.newest("k", 0) is not None


def test_the_journal_holds_what_no_checkpoint_does(run: RunRecord, slots: Slots) -> None:
    trainer = begin(run, slots, token=1)
    train_until(trainer, 7)
    newest = run.read().checkpoints[-1].step
    assert [entry.step for entry in trainer.handover.journal][-1] == 7
    assert trainer.handover.journal[0].step <= newest + 1, "it may forget late, never early"
    assert len(trainer.handover.journal) < 7


def test_who_is_slow_shows_in_the_time_not_spent_waiting() -> None:
    told: list[Note] = []
    trainer = make_trainer(recipe=Interrupted())
    trainer.tell = told.append
    finish = trainer.reducer.finish

    def wait_for_a_slow_peer() -> Tensor:
        time.sleep(0.3)
        return finish()

    def seconds_to_report() -> float:
        started = time.monotonic()
        with exact_arithmetic():
            trainer.report_step(trainer.train_step())
        return time.monotonic() - started

    seconds_to_report()
    trainer.reducer.finish = wait_for_a_slow_peer  # type: ignore[method-assign]
    seconds = seconds_to_report()
    CALLS[0] = lambda: time.sleep(0.06)
    seconds_of_slow_one = seconds_to_report()
    CALLS[0] = lambda: None
    assert [note.step for note in told] == [1, 2, 3]
    _, waited, worked = trainer.pace.seconds
    assert waited <= seconds - 0.3
    assert 5 * 0.06 <= worked <= seconds_of_slow_one - 0.3


# ---- two threads -----------------------------------------------------------------------------------------------------


class SlowCopy:
    """In the place of the writing of a slot: begins, and goes on after `pause`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, pause: Callable[[], object]) -> None:
        self._pause = pause
        self._write = handover_module._write
        self.has_begun = threading.Event()
        self.num_whole = 0
        monkeypatch.setattr(handover_module, "_write", self.write)

    def write(self, *arguments: Any) -> None:
        self.has_begun.set()
        self._pause()
        self._write(*arguments)
        self.num_whole += 1


@pytest.mark.parametrize("next_thing", ["a step", "a validation"])
def test_nothing_changes_while_another_thread_copies(
    slots: Slots, monkeypatch: pytest.MonkeyPatch, next_thing: str
) -> None:
    """Asked between two steps, when the buffers that are there are those to be copied."""
    trainer = step_through(make_trainer(recipe=Interrupted()), 2)
    settled = trainer.state.state_sha256()
    trainer.handover = Handover(slots, run_key="k", generation=0)
    trainer.handover.keep(trainer.settled_state)
    is_under_way = threading.Event()
    copy = SlowCopy(monkeypatch, lambda: is_under_way.wait(0.5))
    CALLS[0] = is_under_way.set
    leaving = threading.Thread(target=trainer.handover.leave)
    leaving.start()
    assert copy.has_begun.wait(120)
    with exact_arithmetic():
        trainer.train_step() if next_thing == "a step" else trainer.validate(max_samples=None)
    CALLS[0] = lambda: None
    leaving.join(120)
    memory = slots.newest("k", 0)
    assert memory is not None
    assert memory.step == 2
    assert tensors_sha256(tensorfile.tensors(file_of(memory))) == settled


def test_two_threads_that_leave_write_once_and_both_wait_for_it(slots: Slots, monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent says stop, and the training thread finds that a peer is gone: each ends the process after its copy."""
    monkeypatch.setattr(handover_module, "LOCK_SECONDS", 0.01)
    handover = Handover(slots, run_key="k", generation=0)
    handover.keep(lambda: (3, {}))
    go_on = threading.Event()
    copy = SlowCopy(monkeypatch, lambda: go_on.wait(120))
    first, second = (threading.Thread(target=handover.leave) for _ in range(2))
    first.start()
    assert copy.has_begun.wait(120)
    second.start()
    second.join(0.1)
    assert second.is_alive(), "the process must not end before the copy is whole"
    go_on.set()
    first.join(120)
    second.join(120)
    assert copy.num_whole == 1
    assert slots.newest("k", 0) is not None
    with handover.update():
        """The lock was given back."""


def test_a_copy_that_fails_does_not_keep_the_process_from_saying_why_it_ends(
    slots: Slots, monkeypatch: pytest.MonkeyPatch
) -> None:
    handover = Handover(slots, run_key="k", generation=0)

    def fail() -> tuple[int, Mapping[str, Tensor]]:
        raise OSError("no memory is left")

    handover.keep(fail)
    handover.reserve()
    handover.leave()
    assert slots.newest("k", 0) is None
    with handover.update():
        """The lock was given back."""


class LeavingServers:
    """As training.servers.colocated, with these bytes."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = pieces
        self.taken = b""

    def leave(self) -> list[memoryview]:
        if not self.pieces:
            raise OSError("no memory is left")
        return [memoryview(piece) for piece in self.pieces]

    def num_left_bytes(self) -> int:
        return sum(map(len, self.pieces))

    def take_up(self, left: memoryview) -> None:
        self.taken = bytes(left)


def test_what_servers_leave_is_found_once_a_state_or_not(slots: Slots) -> None:
    servers, handover = LeavingServers(b"ab", b"", b"cde"), Handover(slots, run_key="k")
    handover.keep(dict, servers=servers)  # type: ignore[arg-type]  # no state can be had
    handover.reserve()
    handover.leave()
    assert slots.newest("k", 0) is None
    Handover(slots, run_key="k", generation=1).find_servers(servers)
    assert servers.taken == b""
    found = Handover(slots, run_key="k")
    found.find_servers(servers)
    assert servers.taken == b"abcde"
    found.keep(lambda: (1, {}))
    servers.taken = b""
    found.find_servers(servers)
    assert servers.taken == b""


def test_servers_that_leave_nothing_are_told_of(slots: Slots, caplog: pytest.LogCaptureFixture) -> None:
    handover = Handover(slots, run_key="k")
    handover.keep(lambda: (1, {}), servers=LeavingServers())
    handover.leave()
    assert slots.newest("k", 0) is not None
    assert "nothing is left in memory of servers" in caplog.text
