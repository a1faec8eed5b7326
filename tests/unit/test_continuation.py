"""More steps for a run that is there: what was done is taken over, and the result is that of a run that did it all."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from tests.unit.fakes import DictRendezvous
from tests.unit.tiny import Tiny, exact_arithmetic, make_trainer, tiny_preset
from training.checkpoints.checkpoint import folder
from training.checkpoints.continuation import Sibling, find_siblings, is_new, note_sibling, take_over
from training.checkpoints.saver import CheckpointSaver
from training.environment import fingerprint
from training.runs.events import EventWriter
from training.runs.history import committed_steps
from training.runs.identity import identity_key, keep_identity
from training.runs.record import Continued, Record, RunRecord, run_key, trajectory_key, with_environment
from training.s3.objectstore import Store

LEVEL = Tiny(is_level=True)


@dataclass(frozen=True)
class Runs:
    """Runs of one trajectory on one store."""

    store: Store

    def begin(self, num_steps: int, recipe: Tiny = LEVEL) -> RunRecord:
        preset = tiny_preset(steps=num_steps)
        run = RunRecord(self.store, run_key(recipe=recipe, preset=preset, dataset_digest="d"))
        keep_identity(self.store, run.run_key, recipe=recipe, preset=preset, dataset_digest="d")
        run.create_if_missing()
        note_sibling(self.store, self.trajectory(recipe), run_key=run.run_key, num_steps=num_steps)
        return run

    def trajectory(self, recipe: Tiny = LEVEL) -> str:
        return trajectory_key(recipe=recipe, preset=tiny_preset(), dataset_digest="d")

    def siblings(self, run: RunRecord, num_steps: int, recipe: Tiny = LEVEL) -> list[Sibling]:
        where = self.trajectory(recipe)
        return find_siblings(self.store, where, run_key=run.run_key, recipe=recipe, num_steps=num_steps)

    def train(self, run: RunRecord, num_steps: int, recipe: Tiny = LEVEL) -> Record:
        """As a group of one rank would, to the end."""
        token = run.update(lambda record: replace(record, token=record.token + 1)).token
        prefix = run.prefix(run.update(lambda record: with_environment(record, fingerprint(), token=token)))
        events = EventWriter(run.store, prefix, token)
        saver = CheckpointSaver(
            run=run,
            prefix=prefix,
            rendezvous=DictRendezvous(),  # type: ignore[arg-type]  # it has all that is used
            rank=0,
            world_size=1,
            token=token,
            keep=3,
            before_commit=events.flush,
        )
        preset = tiny_preset(steps=num_steps)
        with exact_arithmetic():
            make_trainer(preset=preset, recipe=recipe, run=run, saver=saver, events=events, token=token).train()
        return run.read()

    def begin_and_train(self, num_steps: int, recipe: Tiny = LEVEL) -> RunRecord:
        run = self.begin(num_steps, recipe)
        self.train(run, num_steps, recipe)
        return run


@pytest.fixture
def runs(store: Store) -> Runs:
    return Runs(store)


def state_of_one_go(num_steps: int) -> str:
    with exact_arithmetic():
        trainer = make_trainer(preset=tiny_preset(steps=num_steps), recipe=LEVEL)
        while trainer.state.step < num_steps:
            trainer.train_step()
    return trainer.state.state_sha256()


@pytest.mark.parametrize(("earlier_steps", "taken_over"), [((4,), 4), ((3, 5), 5), ((9,), 8)])
def test_what_another_run_did_is_not_done_again(runs: Runs, earlier_steps: tuple[int, ...], taken_over: int) -> None:
    """The longest of shorter ones, or a longer one's checkpoint on the way: same bits, one history, no step twice."""
    for num_steps in earlier_steps:
        runs.begin_and_train(num_steps)
    run = runs.begin(8)
    sibling = runs.siblings(run, 8)[0]
    assert take_over(run, sibling).continued == Continued(run_key=sibling.run.run_key, generation=0, step=taken_over)
    record = runs.train(run, 8)
    assert record.result is not None
    assert record.result.state_sha256 == state_of_one_go(8)
    assert record.attempt_starts == (0, taken_over)
    history = committed_steps(run, record)
    assert [event.step for event in history] == list(range(1, 9))
    assert [event.values["loss"] for event in history] == pytest.approx(losses_of_one_go(runs), abs=0)


def losses_of_one_go(runs: Runs) -> list[float]:
    alone = Runs(Store(replace(runs.store.location, prefix=runs.store.location.prefix + "alone/")))
    run = alone.begin_and_train(8)
    return [float(event.values["loss"]) for event in committed_steps(run, run.read())]


def test_a_run_of_another_trajectory_is_none_whatever_lies_in_the_folder(runs: Runs, store: Store) -> None:
    """Its checkpoints are genuine: taken over, they would be signed as ours."""
    other = runs.begin_and_train(4, replace(LEVEL, learning_rate=0.5))
    run = runs.begin(6)
    note_sibling(store, runs.trajectory(), run_key=other.run_key, num_steps=4)
    assert runs.siblings(run, 6) == []
    own = runs.begin_and_train(4)
    note_sibling(store, runs.trajectory(), run_key=own.run_key, num_steps=5)
    assert [(one.run.run_key, one.num_common_steps) for one in runs.siblings(run, 6)] == [(own.run_key, 4)]
    store.put(identity_key(own.run_key), b"{}")
    assert runs.siblings(run, 6) == [], "nothing says of what it is"
    store.delete(identity_key(own.run_key))
    assert runs.siblings(run, 6) == []


def test_the_other_run_may_be_removed(runs: Runs, store: Store) -> None:
    other, run = runs.begin_and_train(4), runs.begin(6)
    take_over(run, runs.siblings(run, 6)[0])
    for key, _ in list(store.list_keys(f"runs/{other.run_key}/")):
        store.delete(key)
    result = runs.train(run, 6).result
    assert result is not None
    assert result.state_sha256 == state_of_one_go(6)
    assert runs.siblings(runs.begin(7), 7)[0].run.run_key == run.run_key


def test_a_schedule_that_depends_on_the_number_of_steps_shares_nothing(runs: Runs) -> None:
    runs.begin_and_train(4, Tiny())
    (sibling,) = runs.siblings(runs.begin(6, Tiny()), 6, Tiny())
    assert (sibling.num_common_steps, sibling.usable, sibling.step) == (0, [], 0)


def test_other_trajectories_are_no_siblings(runs: Runs) -> None:
    run = runs.begin_and_train(4)
    others = [tiny_preset(batch_size=25), replace(tiny_preset(), seed=8)]
    keys = {trajectory_key(recipe=LEVEL, preset=preset, dataset_digest="d") for preset in others}
    keys |= {trajectory_key(recipe=LEVEL, preset=tiny_preset(), dataset_digest="e"), runs.trajectory(Tiny())}
    assert len(keys | {runs.trajectory()}) == 5
    assert runs.siblings(run, 4) == [], "a run is not its own"


def test_a_damaged_checkpoint_is_passed_over(runs: Runs, store: Store) -> None:
    other, run = runs.begin_and_train(6), runs.begin(8)
    record = other.read()
    newest = record.checkpoints[-1]
    store.put(folder(other.prefix(record), newest.step, newest.token) + "part-0.safetensors", b"damaged")
    continued = take_over(run, runs.siblings(run, 8)[0]).continued
    assert continued is not None
    assert continued.step == 4
    result = runs.train(run, 8).result
    assert result is not None
    assert result.state_sha256 == state_of_one_go(8)


def test_lost_history_is_not_taken_over(runs: Runs, store: Store) -> None:
    """It could prove nothing: neither what was read, nor what the loss was."""
    other, run = runs.begin_and_train(4), runs.begin(6)
    for key, _ in list(store.list_keys(f"runs/{other.run_key}/0/events/")):
        store.delete(key)
    record = take_over(run, runs.siblings(run, 6)[0])
    assert record.continued is None
    assert is_new(record)


def test_a_run_that_somebody_begins_meanwhile_is_left_alone(runs: Runs, store: Store) -> None:
    runs.begin_and_train(4)
    run = runs.begin(6)
    (sibling,) = runs.siblings(run, 6)

    class BegunMeanwhile(RunRecord):
        def update(self, change):  # type: ignore[no-untyped-def]
            after = super().update(change)
            if is_new(after):
                super().update(lambda record: replace(record, token=record.token + 1))
            return after

    assert take_over(BegunMeanwhile(store, run.run_key), sibling).continued is None
    assert runs.train(run, 6).attempt_starts == (0,)


@pytest.mark.parametrize("name", ["", "x", "3", "-k", "x-k", "\u0663-k", f"{'9' * 5000}-k", "3-../../x"], ids=len)
def test_a_name_that_is_no_siblings_is_passed_over(store: Store, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(store)
    mine, other = runs.begin(6), runs.begin(3)
    runs.train(other, 3)
    there = [*store.list_keys(f"trajectories/{runs.trajectory()}/"), (f"trajectories/{runs.trajectory()}/{name}", 0)]
    monkeypatch.setattr(store, "list_keys", lambda prefix: iter(there))
    assert [sibling.run.run_key for sibling in runs.siblings(mine, 6)] == [other.run_key]
