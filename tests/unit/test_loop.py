"""The loop of one rank: its bits are pinned, it resumes where it was, and failures name the sample."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from tests.unit.attempts import attempt, history, step_through, train
from tests.unit.fakes import FaultyStore
from tests.unit.tiny import (
    NUM_CLASSES,
    MemoryFeed,
    MemoryReader,
    Tiny,
    exact_arithmetic,
    make_trainer,
    tiny_preset,
    tiny_reader,
)
from training.arithmetic.objective import stream_seed
from training.data.stream import Microbatch
from training.environment import NUMERICS_VERSION, fingerprint
from training.errors import DeterministicError, FencedError, UserError
from training.loop import Trainer
from training.runs.record import RunRecord
from training.s3.objectstore import Store
from training.step import StepOutcome

GOLDEN_FILE = Path(__file__).parents[1] / "golden" / "numerics.json"


# ---- the bits --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Plain(Tiny):
    """Only sums, products and quotients: those are alike on all CPUs, roots, exponentials and logarithms are not."""

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        wanted = nn.functional.one_hot(batch["label"], NUM_CLASSES)
        return ((model(self.inputs(batch)) - wanted) ** 2).mean()

    def optimizer(self, model: nn.Module) -> Optimizer:
        return SGD(model.parameters(), lr=self.learning_rate, momentum=0.9, foreach=False)


@pytest.mark.parametrize("recipe", [Plain(), Tiny()], ids=["plain", "tiny"])
def test_the_bits_of_training_are_golden(recipe: Tiny) -> None:
    golden = json.loads(GOLDEN_FILE.read_text())
    here = fingerprint()
    names = (
        ("torch", "instruction_set", "device", "arithmetic") if type(recipe) is Tiny else ("torch", "instruction_set")
    )
    for name in names:
        if here[name] != golden["environment"][name]:
            pytest.skip(f"pinned for {name} = {golden['environment'][name]}; this machine has {here[name]}")
    state = step_through(make_trainer(recipe=recipe), 6).state
    digests = {"weights_sha256": state.weights_sha256(), "state_sha256": state.state_sha256()}
    name = type(recipe).__name__.lower()
    found = {**golden, "numerics_version": NUMERICS_VERSION, name: digests}
    assert found == golden, (
        "training gives other bits than before: if that is meant, raise NUMERICS_VERSION in training/environment.py"
        f" (so that finished runs are not taken for these) and put this into {GOLDEN_FILE.name}:\n"
        + json.dumps({**found, "environment": here}, indent=2)
    )


@pytest.mark.parametrize(
    "change",
    [{"clip_norm": None}, {"clip_norm": 0.4}, {"virtual_workers": 4}, {"batch_size": 25}, {"steps": 7}],
    ids=["no clipping", "clip_norm", "virtual_workers", "batch_size", "steps"],
)
def test_what_determines_the_result_shows_in_it(change: dict[str, object]) -> None:
    base = step_through(make_trainer(), 6).state.weights_sha256()
    other = step_through(make_trainer(preset=tiny_preset(**change)), 6).state.weights_sha256()  # type: ignore[arg-type]
    assert other != base


def test_validation_shows_and_changes_nothing() -> None:
    calm = step_through(make_trainer(), 3).state.state_sha256()
    trainer = make_trainer(preset=tiny_preset(validate_every_steps=2))
    with exact_arithmetic():
        outcomes = [trainer.train_step() for _ in range(3)]
    assert trainer.state.state_sha256() == calm
    assert [sorted(outcome.validation) for outcome in outcomes] == [[], ["loss"], []]
    assert trainer.state.model.training


def test_random_streams_are_keyed_by_seed_step_and_virtual_worker() -> None:
    seeds = {stream_seed(*key) for key in np.ndindex(5, 5, 5)}
    assert len(seeds) == 125
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert stream_seed(1, 12, 3) != stream_seed(11, 2, 3)


@dataclass(frozen=True, kw_only=True)
class Chancy(Tiny):
    """Uses every random generator there is."""

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return super().loss(model, batch) * float(1 + random.random() + np.random.rand() + torch.rand(()))


def test_every_global_random_generator_is_keyed() -> None:
    first = step_through(make_trainer(recipe=Chancy()), 3).state.weights_sha256()
    random.random(), np.random.rand(), torch.rand(())
    assert step_through(make_trainer(recipe=Chancy()), 3).state.weights_sha256() == first


class DrawingFeed(MemoryFeed):
    """Draws from the model's generator, as torch's DataLoader does when it starts."""

    def microbatches(self, *, workers: Sequence[int], step: int) -> Iterator[Microbatch]:
        for batch in super().microbatches(workers=workers, step=step):
            torch.rand(())
            yield batch


def test_a_feed_that_draws_random_numbers_changes_nothing() -> None:
    trainer = make_trainer()
    trainer.feed = DrawingFeed(tiny_reader(), trainer.preset)
    assert step_through(trainer, 3).state.weights_sha256() == step_through(make_trainer(), 3).state.weights_sha256()


def test_counters_advance_once_per_step_and_not_per_virtual_worker() -> None:
    state = step_through(make_trainer(), 3).state
    assert state.tensors()["model.norm.num_batches_tracked"].item() == 3


def test_clipping_bounds_the_norm_of_what_is_applied() -> None:
    trainer = make_trainer(preset=tiny_preset(clip_norm=0.01))
    with exact_arithmetic():
        norm_before = trainer.train_step().grad_norm
    gradients = [p.grad.flatten() for p in trainer.state.model.parameters() if p.grad is not None]
    assert norm_before > 0.01
    assert torch.linalg.vector_norm(torch.cat(gradients)).item() == pytest.approx(0.01, rel=1e-5)


# ---- a whole run -----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(store: Store) -> RunRecord:
    record = RunRecord(store, "k")
    record.create_if_missing()
    return record


def test_a_run_commits_its_result_and_tells_every_step(run: RunRecord) -> None:
    train(attempt(run, token=1))
    record = run.read()
    assert record.result is not None
    expected = step_through(make_trainer(), 6).state
    assert record.result.step == 6
    assert record.result.weights_sha256 == expected.weights_sha256()
    assert record.result.state_sha256 == expected.state_sha256()
    assert record.result.checkpoint == record.checkpoints[-1]
    assert [c.step for c in record.checkpoints] == [2, 4, 6]
    assert history(run) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("dies_after", [1, 2, 3, 5])
def test_a_run_that_dies_ends_in_the_same_bits_with_each_step_once(run: RunRecord, dies_after: int) -> None:
    first = attempt(run, token=1)

    class DiedError(Exception):
        pass

    def die(outcome: StepOutcome) -> None:
        Trainer.report_step(first, outcome)
        if first.state.step == dies_after:
            first.saver.wait()
            raise DiedError

    first.report_step = die  # type: ignore[method-assign]
    with pytest.raises(DiedError):
        train(first)
    assert first.maybe_events is not None
    first.maybe_events.flush()
    train(attempt(run, token=2))
    result = run.read().result
    assert result is not None
    assert result.state_sha256 == step_through(make_trainer(), 6).state.state_sha256()
    resumed_at = (dies_after - 1) // 2 * 2
    assert run.read().resume_steps == (0, resumed_at)
    assert history(run) == [1, 2, 3, 4, 5, 6]


def test_a_finished_state_without_a_result_is_only_committed(run: RunRecord) -> None:
    """The last attempt died between its last checkpoint and the result."""
    first = attempt(run, token=1)
    with exact_arithmetic():
        while first.state.step < 6:
            first.train_step()
    first.saver.save(6, first.state.tensors(), on_commit=lambda reference: None)
    first.saver.wait()
    second = attempt(run, token=2)
    train(second)
    result = run.read().result
    assert result is not None
    assert result.state_sha256 == first.state.state_sha256()
    assert run.read().resume_steps[-1] == 6


@pytest.mark.parametrize("away_at", [2, 4])
def test_a_store_away_at_a_checkpoint_never_stops_the_training(run: RunRecord, store: Store, away_at: int) -> None:
    """The checkpoint is late or missing; the run goes on, to the same bits."""
    faulty = FaultyStore(store, lambda key: f"{away_at:08d}-000001/part" in key)
    train(attempt(run, token=1, store=faulty))
    assert faulty.num_faults == 1
    record = run.read()
    assert record.result is not None
    assert record.result.state_sha256 == step_through(make_trainer(), 6).state.state_sha256()
    assert [c.step for c in record.checkpoints] == [step for step in (2, 4, 6) if step != away_at]


def test_a_fenced_run_stops_and_writes_nothing_more(run: RunRecord) -> None:
    first = attempt(run, token=1)
    run.update(lambda record: replace(record, token=2))
    with pytest.raises(FencedError):
        train(first)
    record = run.read()
    assert (record.result, record.checkpoints, record.resume_steps) == (None, (), ())


def test_a_run_fenced_off_at_its_end_has_no_result(run: RunRecord) -> None:
    first = attempt(run, token=1)
    finish = first.finish

    def take_over_and_finish() -> None:
        first.saver.wait()
        run.update(lambda record: replace(record, token=2))
        finish()

    first.finish = take_over_and_finish  # type: ignore[method-assign]
    with pytest.raises(FencedError):
        train(first)
    record = run.read()
    assert record.result is None
    assert [c.step for c in record.checkpoints] == [2, 4]


# ---- failures --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Broken(Tiny):
    """Fails in its loss, in the way that `mistake` says."""

    mistake: str = ""

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        if self.mistake == "key":
            return batch["none"].sum()
        if self.mistake == "memory":
            return torch.empty(2**60, dtype=torch.uint8).sum()
        if self.mistake == "uninitialized":
            return super().loss(model, batch) + torch.empty(1000).sum()
        if self.mistake == "shape":
            return (batch["x"] @ torch.zeros(7, 3)).sum()
        return super().loss(model, batch) * float(self.mistake)


@pytest.mark.parametrize("mistake", ["nan", "inf", "key"])
def test_a_failure_of_the_recipe_is_deterministic_and_names_the_step_and_the_samples(mistake: str) -> None:
    with pytest.raises(DeterministicError, match=r"step 1, virtual worker 0: .*samples memory:\d+"):
        step_through(make_trainer(recipe=Broken(mistake=mistake)), 1)


def test_memory_that_was_never_written_is_found_in_the_first_step(run: RunRecord) -> None:
    """It may hold the same as before for a while, and other bits on another machine."""
    with pytest.raises(DeterministicError, match="step 1, virtual worker 0: the loss is nan"):
        train(attempt(run, token=1, recipe=Broken(mistake="uninitialized")))


def test_a_failure_inside_torch_names_the_step_and_the_samples_too() -> None:
    """Whatever its class: torch raises RuntimeError for wrong shapes as well as for a lack of memory."""
    with pytest.raises(Exception, match=r"step 1, virtual worker 0: .*samples memory:\d+"):
        step_through(make_trainer(recipe=Broken(mistake="shape")), 1)


def test_a_lack_of_memory_is_not_deterministic() -> None:
    """Another process may have taken it: the run is tried again."""
    with pytest.raises(Exception, match="memory") as caught:
        step_through(make_trainer(recipe=Broken(mistake="memory")), 1)
    assert not isinstance(caught.value, DeterministicError)


def test_a_sample_that_is_not_finite_is_named() -> None:
    reader = tiny_reader()
    columns = reader.read(range(len(reader)))[1]
    columns["x"][11, 0] = np.nan
    trainer = make_trainer(reader=MemoryReader(columns), preset=tiny_preset(steps=20))
    with pytest.raises(DeterministicError, match=r"samples .*memory:11\b"):
        step_through(trainer, 2)  # an epoch and more


@dataclass(frozen=True, kw_only=True)
class HalfPrecision(Tiny):
    """Its weights are bfloat16."""

    def model(self) -> nn.Module:
        return super().model().to(torch.bfloat16)


def test_weights_of_another_dtype_than_float32_are_refused() -> None:
    with pytest.raises(UserError, match=r"parameters of torch\.bfloat16; exact mode needs float32"):
        _ = make_trainer(recipe=HalfPrecision()).reducer


class Unreached(nn.Module):
    """Holds a parameter that the loss never reaches."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x)
        return found


@dataclass(frozen=True, kw_only=True)
class WithUnreached(Tiny):
    """A model with a parameter that the loss never reaches."""

    def model(self) -> nn.Module:
        return Unreached(super().model())


def test_a_parameter_that_the_loss_does_not_reach_counts_as_zeros() -> None:
    trainer = make_trainer(recipe=WithUnreached())
    with exact_arithmetic():
        trainer.train_step()
    unused = dict(trainer.state.model.named_parameters())["unused"]
    assert unused.grad is not None
    assert unused.grad.tolist() == [0.0, 0.0]
