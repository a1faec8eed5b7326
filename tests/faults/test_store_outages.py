"""A store that answers 503, or whose disk is full, while a run trains: steps go on, and nothing false is committed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults.evidence import write_evidence
from tests.faults.moments import AFTER_COMMIT, MOMENTS, call_at
from tests.faults.proxy import LosingProxy
from tests.faults.small_disk import small_disk
from tests.unit.attempts import attempt, history, step_through, train
from tests.unit.tiny import make_trainer, tiny_preset
from training.checkpoints.checkpoint import load_checkpoint
from training.checkpoints.state import TrainState, tensors_sha256
from training.errors import InfrastructureError
from training.loop import Trainer
from training.runs.history import events_of
from training.runs.record import RunRecord
from training.s3.objectstore import Store
from training.step import StepOutcome

STEPS = 16
STRUCK = 4
"""The checkpoint, one of every second step, at whose saving the fault begins."""


class Outage:
    """From `begin`, until the training has told of a checkpoint that failed and made four steps more, or longer."""

    def __init__(self, trainer: Trainer, end: Callable[[], None], *, min_seconds: float = 0.0) -> None:
        self._trainer = trainer
        self._end = end
        self._min_seconds = min_seconds
        self._started = 0.0
        self._num_failed = 0
        self._steps_after = 0
        self.steps: list[int] = []
        """The steps that were made meanwhile."""
        self.is_on = False
        self.seconds = 0.0
        self._report_step, self._emit = trainer.report_step, trainer.checkpoints.emit
        trainer.report_step = self.report_step  # type: ignore[method-assign]
        trainer.checkpoints.emit = self.emit

    def begin(self) -> None:
        self._started = time.monotonic()
        self.is_on = True

    def emit(self, kind: str, *, step: int, **values: object) -> None:
        self._num_failed += kind == "checkpoint_failed"
        self._emit(kind, step=step, **values)

    def report_step(self, outcome: StepOutcome) -> None:
        self._report_step(outcome)
        assert not self._trainer.handover.is_waiting, "a rank that trains may hang, whatever became of its checkpoint"
        if not self.is_on:
            return
        self.steps.append(self._trainer.state.step)
        time.sleep(self._min_seconds / 200)  # steps that last: there must be some left when it ends
        self._steps_after += self._num_failed > 0
        self.seconds = time.monotonic() - self._started
        if self._steps_after >= 4 and self.seconds >= self._min_seconds:
            self._end()
            self.is_on = False


def told(run: RunRecord, kind: str) -> list[int]:
    """The steps of the events of a kind."""
    return [event.step for event in events_of(run, run.read()) if event.kind == kind]


def require_truth(run: RunRecord, *, steps: int = STEPS) -> None:
    """The result and every named checkpoint hold what a calm run has at that step; each step was told of once."""
    record = run.read()
    assert record.result is not None
    assert record.result.checkpoint == record.checkpoints[-1]
    assert history(run) == list(range(1, steps + 1))
    calm = make_trainer(preset=tiny_preset(steps=steps))
    for checkpoint in record.checkpoints:
        found = load_checkpoint(run.store, run.prefix(record), checkpoint)
        assert tensors_sha256(found) == step_through(calm, checkpoint.step).state.state_sha256()
    assert record.result.state_sha256 == calm.state.state_sha256()


@pytest.fixture(autouse=True)
def saves_when_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine however slow: by default a checkpoint that is due waits two seconds for the one before."""
    monkeypatch.setattr("training.checkpointing.PATIENCE_SECONDS", 60.0)


@pytest.fixture
def run(store: Store) -> RunRecord:
    record = RunRecord(store, "k")
    record.create_if_missing()
    return record


def through(proxy: LosingProxy, run: RunRecord) -> Store:
    return Store(replace(run.store.location, endpoint=proxy.endpoint))


@pytest.mark.usefixtures("quick_retries")
@pytest.mark.parametrize("moment", MOMENTS)
def test_training_goes_on_while_the_store_answers_503(run: RunRecord, proxy: LosingProxy, moment: str) -> None:
    outage = answer_503(run, proxy, MOMENTS[moment])
    assert told(run, "checkpoint_failed")[:2] == [STRUCK + 2, STRUCK + 4], "it is told of before the next is saved"
    assert len(outage.steps) >= 4
    assert STRUCK not in [checkpoint.step for checkpoint in run.read().checkpoints]
    require_truth(run)


def answer_503(
    run: RunRecord,
    proxy: LosingProxy,
    moment: tuple[str, str, int],
    *,
    steps: int = STEPS,
    keep_checkpoints: int = 9,
    min_seconds: float = 0.0,
) -> Outage:
    """A run through an outage that begins at the moment."""
    trainer = attempt(run, token=1, store=through(proxy, run), steps=steps, keep_checkpoints=keep_checkpoints)

    def begin() -> None:
        proxy.is_away = True
        outage.begin()

    def end() -> None:
        proxy.is_away = False

    outage = Outage(trainer, end, min_seconds=min_seconds)
    call_at(proxy, moment, begin, step=STRUCK)
    train(trainer)
    assert proxy.num_refused > 0
    return outage


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_training_goes_on_while_the_store_answers_503_for_a_minute(run: RunRecord, proxy: LosingProxy) -> None:
    outage = answer_503(run, proxy, MOMENTS["the part is sent"], steps=400, min_seconds=60.0)
    require_truth(run, steps=400)
    row = {
        "seconds_away": round(outage.seconds),
        "num_refused": proxy.num_refused,
        "steps_made_meanwhile": len(outage.steps),
        "checkpoints_failed_at": told(run, "checkpoint_failed"),
        "same_state": True,
    }
    write_evidence("store-away", rows=[row])


@pytest.mark.usefixtures("quick_retries")
def test_a_commit_stands_although_the_store_goes_away_before_old_objects_are_deleted(
    run: RunRecord, proxy: LosingProxy
) -> None:
    """They are deleted after the next commit."""
    answer_503(run, proxy, AFTER_COMMIT, keep_checkpoints=1)
    assert STRUCK in told(run, "checkpoint")
    assert STRUCK + 4 in told(run, "checkpoint_failed")
    assert {key.split("/")[-2] for key, _ in run.store.list_keys("runs/k/0/checkpoints/")} == {f"{STEPS:08d}-000001"}
    require_truth(run)


@pytest.mark.usefixtures("quick_retries")
def test_a_short_outage_makes_a_checkpoint_late_and_no_more(run: RunRecord, proxy: LosingProxy) -> None:
    trainer = attempt(run, token=1, store=through(proxy, run), steps=STEPS, keep_checkpoints=9)

    def watch(method: str, path: str, status: int) -> None:
        proxy.maybe_refused = f"{STRUCK:08d}-" if proxy.num_refused < 3 else None  # no request beside those

    proxy.watch = watch
    train(trainer)
    assert proxy.num_refused == 3
    assert told(run, "checkpoint_failed") == []
    assert [checkpoint.step for checkpoint in run.read().checkpoints] == list(range(2, STEPS + 1, 2))
    require_truth(run)


@pytest.mark.usefixtures("quick_retries")
@pytest.mark.parametrize("moment", ["the part is sent", "the manifest was read back", "the record is replaced"])
def test_a_run_whose_store_is_away_at_the_end_has_no_result_until_it_is_started_again(
    run: RunRecord, proxy: LosingProxy, moment: str
) -> None:
    trainer = attempt(run, token=1, store=through(proxy, run), steps=STEPS)
    call_at(proxy, MOMENTS[moment], lambda: setattr(proxy, "is_away", True), step=STEPS)
    with pytest.raises(InfrastructureError):
        train(trainer)
    assert proxy.num_refused > 0
    assert run.read().result is None
    train(attempt(run, token=2, steps=STEPS))
    require_truth(run)


@pytest.mark.usefixtures("quick_retries")
def test_training_goes_on_while_the_disk_of_the_store_is_full(tmp_path: Path) -> None:
    with small_disk(tmp_path / "home") as disk:
        run = RunRecord(disk.store, "k")
        run.create_if_missing()
        trainer = attempt(run, token=1, steps=60, keep_checkpoints=99)
        outage = Outage(trainer, disk.make_room)
        begin = trainer.checkpoints.begin

        def fill_and_begin(state: TrainState) -> None:
            if trainer.state.step == STRUCK:
                disk.fill()
                outage.begin()
            begin(state)

        trainer.checkpoints.begin = fill_and_begin  # type: ignore[method-assign]
        train(trainer)
        assert not outage.is_on
        assert len(outage.steps) >= 4
        assert told(run, "checkpoint_failed")
        require_truth(run, steps=60)
