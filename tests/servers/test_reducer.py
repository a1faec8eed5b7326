"""What a rank gives each shard goes while its backward pass does, and adds up to the same bits."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.unit.tiny import NUM_CLASSES, NUM_INPUTS, Tiny, exact_arithmetic, make_trainer, tiny_preset
from training.arithmetic.norm import BLOCK_ELEMENTS
from training.errors import UserError
from training.loop import Trainer
from training.servers.colocated import Colocated
from training.servers.layout import departures, shards

PRESET = tiny_preset()
SERVED = replace(PRESET, train=replace(PRESET.train, strategy="parameter_server"))
NUM_UNITS = 2 * BLOCK_ELEMENTS // NUM_INPUTS
LIMIT_SECONDS = 60.0
SIZES = st.lists(st.integers(0, 3 * BLOCK_ELEMENTS), min_size=1, max_size=6)


@settings(deadline=None)
@given(SIZES, st.integers(1, 5), st.sets(st.integers(0, 5)))
def test_a_shard_goes_once_as_soon_as_all_that_it_needs_is_there(
    sizes: list[int], num_shards: int, some: set[int]
) -> None:
    tables = {number: 1 for number, size in enumerate(sizes) if number in some and size}
    all_shards = shards(sizes, num_shards, tables)
    found = departures(all_shards, len(sizes))
    parameters = [number for departure in found for number in departure.parameters]
    assert sorted(parameters) == [number for number in range(len(sizes)) if number not in tables]
    gone = [shard for departure in found for shard in departure.shards]
    assert gone == sorted(gone, reverse=True)
    have_tables = {at for at, shard in enumerate(all_shards) if any(piece.row_elements for piece in shard)}
    assert set(gone) == set(range(num_shards)) - have_tables
    assert 0 in have_tables or 0 in found[-1].shards, "the extras are of the last bucket"
    there: set[int] = set()
    for departure in found[:-1]:
        before, there = set(there), there | set(departure.parameters)
        for shard in departure.shards:
            needed = {piece.parameter for piece in all_shards[shard]}
            assert needed <= there
            assert not needed or needed & (there - before), "it could have gone before"


class Between(torch.autograd.Function):
    """Two layers; `pause` is called as the backward pass comes from one to the other."""

    pause: Any = staticmethod(lambda: None)

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        Between.pause()
        return gradients[0]


class DeepModel(nn.Module):
    """[batch, 5] to [batch, 3]; each layer has two blocks, so of two shards each has one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(NUM_UNITS, NUM_INPUTS))
        self.second = nn.Parameter(torch.randn(NUM_CLASSES, 2 * BLOCK_ELEMENTS // NUM_CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        hidden = (x[:, None, :] * self.first).tanh().sum(dim=2).mean(dim=1, keepdim=True)
        passed: Tensor = Between.apply(hidden)  # type: ignore[no-untyped-call]  # torch has no annotation here
        return (passed[:, :, None] * self.second).tanh().sum(dim=2)


@dataclass(frozen=True, kw_only=True)
class Deep(Tiny):
    """The same records."""

    def model(self) -> nn.Module:
        return DeepModel()


def served(recipe: Deep) -> Trainer:
    preset = replace(SERVED, launch=replace(SERVED.launch, servers=2))
    servers = Colocated(recipe, preset, address="127.0.0.1", secret="s")
    trainer = make_trainer(preset=preset, recipe=recipe, servers=servers)
    assert not servers.can_go_on(None, nodes=[0])
    servers.begin(trainer.state, token=1, rank=0)
    return trainer


@contextmanager
def pausing(pause: Any) -> Iterator[None]:
    Between.pause = staticmethod(pause)
    try:
        yield
    finally:
        Between.pause = staticmethod(lambda: None)


def test_the_last_shard_has_its_part_before_the_backward_pass_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the last virtual worker: its pass is held up between the layers until then."""
    calm, trainer = make_trainer(preset=PRESET, recipe=Deep()), served(Deep())
    has_gone, pushed = threading.Event(), []
    push = Colocated.push

    def watched(self: Colocated, step: int, shard: int, *arguments: Any) -> None:
        push(self, step, shard, *arguments)
        pushed.append((step, shard))
        has_gone.set()

    monkeypatch.setattr(Colocated, "push", watched)
    num_passes, gone_meanwhile = 0, []

    def wait() -> None:
        nonlocal num_passes
        num_passes += 1
        if num_passes == PRESET.train.virtual_workers:
            assert has_gone.wait(LIMIT_SECONDS)
        gone_meanwhile.append(list(pushed))

    with exact_arithmetic():
        calm.train_step()
        with pausing(wait):
            trainer.train_step()
    assert gone_meanwhile == [[]] * (PRESET.train.virtual_workers - 1) + [[(1, 1)]]
    assert pushed == [(1, 1), (1, 0)]
    with trainer.whole_state():
        assert trainer.state.state_sha256() == calm.state.state_sha256()


def test_what_ends_a_backward_pass_leaves_nothing_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever closes the reducer waits for what is being given: it may not come to another group."""
    trainer = served(Deep())
    begun, may_end, given = threading.Event(), threading.Event(), []
    push = Colocated.push

    def slow(self: Colocated, step: int, shard: int, *arguments: Any) -> None:
        begun.set()
        assert may_end.wait(LIMIT_SECONDS)
        push(self, step, shard, *arguments)
        given.append(shard)

    monkeypatch.setattr(Colocated, "push", slow)

    num_passes = 0

    def fail() -> None:
        nonlocal num_passes
        num_passes += 1
        if num_passes == PRESET.train.virtual_workers:
            assert begun.wait(LIMIT_SECONDS)
            raise UserError("enough")

    with exact_arithmetic(), pausing(fail), pytest.raises(UserError, match="enough"):
        trainer.train_step()
    closing = threading.Thread(target=trainer.reducer.close)
    closing.start()
    assert given == []
    may_end.set()
    closing.join(LIMIT_SECONDS)
    assert given == [1]
