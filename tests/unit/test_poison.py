"""A record that makes a step fail is named after few replays; and none is blamed that is not to blame."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.unit.attempts import step_through
from tests.unit.tiny import MemoryReader, Tiny, make_trainer, tiny_preset, tiny_reader
from training.diagnosis import poison
from training.diagnosis.poison import MAX_ALONE, NUM_CONFIRMATIONS, Replay, Search, keeping, max_replays
from training.errors import DeterministicError

NUMBERS = st.integers(1, 300)


def search(records: list[str], fails: Callable[[set[str]], bool]) -> poison.Finding:
    found = Search(lambda some: fails(set(some))).run(records)
    assert found is not None
    return found


@given(NUMBERS, st.data())
@settings(derandomize=True, max_examples=200)
def test_one_record_is_found_in_as_many_replays_as_its_number_has_bits(number: int, data: st.DataObject) -> None:
    records = [f"r{k}" for k in range(number)]
    bad = data.draw(st.sampled_from(records))
    found = search(records, lambda some: bad in some)
    assert (found.poison, found.together) == ((bad,), ())
    assert found.num_replays <= max_replays(number) == math.ceil(math.log2(number)) + 3 + NUM_CONFIRMATIONS


@given(NUMBERS, st.data())
@settings(derandomize=True, max_examples=200)
def test_two_that_fail_together_are_told_as_that(number: int, data: st.DataObject) -> None:
    records = [f"r{k}" for k in range(number + 1)]
    both = set(data.draw(st.lists(st.sampled_from(records), min_size=2, max_size=2, unique=True)))
    found = search(records, lambda some: both <= some)
    assert (found.poison, set(found.together)) == ((), both)
    assert "make it fail together, and none of them alone" in str(found)
    assert found.num_replays <= 2 * max_replays(number + 1)


@given(NUMBERS, st.data())
@settings(derandomize=True, max_examples=100)
def test_whatever_fails_the_search_ends_and_what_it_names_fails(number: int, data: st.DataObject) -> None:
    records = [f"r{k}" for k in range(number)]
    causes = [set(c) for c in data.draw(st.lists(st.lists(st.sampled_from(records), min_size=1), min_size=1))]

    def fails(some: set[str]) -> bool:
        return any(cause <= some for cause in causes)

    found = search(records, fails)
    assert found.num_replays <= 12 * max_replays(number)
    assert all(fails({record}) for record in found.alone)
    assert not found.together or fails(set(found.together))


@given(st.integers(1, 40), st.data())
@settings(derandomize=True, max_examples=300)
def test_what_is_named_did_the_same_in_each_replay(number: int, data: st.DataObject) -> None:
    """Whenever a record makes it fail, and whenever not."""
    records = [f"r{k}" for k in range(number)]
    bad = data.draw(st.sampled_from(records))
    coins = data.draw(st.lists(st.booleans(), max_size=60))
    seen: dict[frozenset[str], list[bool]] = {}

    def fails(some: Sequence[str]) -> bool:
        does = bad in some and (coins.pop() if coins else True)
        seen.setdefault(frozenset(some), []).append(does)
        return does

    found = Search(fails).run(records)
    if found is None:
        return
    assert found.num_replays == sum(map(len, seen.values())) <= 12 * max_replays(number)
    for named in [{record} for record in found.alone] + ([set(found.together)] if found.together else []):
        replays = seen[frozenset(named)]
        assert (replays == [True] * (1 + NUM_CONFIRMATIONS)) or not found.repeats
        assert bad in named
    if not found.repeats:
        assert found.poison == ()
        assert not any(record in str(found) for record in records)


def test_innocent_records_are_hardly_ever_named_for_a_flaky_one() -> None:
    """Without confirmation, most of these searches named them."""
    chance = Random(7)
    records = [f"r{k}" for k in range(32)]

    def fails(some: Sequence[str]) -> bool:
        return "r5" in some and chance.random() < 0.5

    found = [found for _ in range(2000) if (found := Search(fails).run(records)) is not None]
    misled = [one for one in found if one.repeats and {*one.alone, *one.together} != {"r5"}]
    unconfirmed = [one for one in found if not one.repeats and {*one.alone, *one.together} != {"r5"}]
    assert len(unconfirmed) > len(found) / 2, "the fault strikes"
    assert len(misled) < len(found) / 50


def test_a_failure_that_does_not_repeat_is_an_ordinary_one_and_says_so() -> None:
    """The group begins again."""
    replays = iter([True, False, True, False])
    found = poison.told(DeterministicError("it fails"), lambda some: next(replays), ["a", "b"], seconds=3.0)
    assert type(found) is RuntimeError
    assert "it fails; the failure does not repeat: " in str(found)


def test_what_fails_on_everything_is_blamed_on_nobody() -> None:
    found = search([f"r{k}" for k in range(64)], lambda some: True)
    assert (len(found.alone), found.fails_without, found.poison) == (MAX_ALONE, True, ())
    assert "no record is to blame" in str(found)
    assert search(["a"], lambda some: True).poison == (), "the only one of its microbatch: others are asked"
    assert search(["a"], lambda some: "a" in some).poison == ("a",)


def test_several_that_fail_by_themselves_are_all_named() -> None:
    found = search([f"r{k}" for k in range(9)], lambda some: bool(some & {"r2", "r7"}))
    assert set(found.poison) == {"r2", "r7"}


def test_a_search_among_what_does_not_fail_finds_nothing() -> None:
    assert Search(lambda some: False).run(["a", "b"]) is None


def test_a_left_out_record_is_replaced_and_the_shape_stays() -> None:
    records = ["a", "a", "b", "c", "d"]
    assert keeping(records, ["a", "c"]) == [0, 1, 3, 3, 1]
    assert keeping(records, records) == [0, 1, 2, 3, 4]


# ---- in a step -------------------------------------------------------------------------------------------------------

BAD = 11
POISON = 1e6


class FailsGoingBack(torch.autograd.Function):
    """Is fine on the way forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise ArithmeticError("no way back")


@dataclass(frozen=True, kw_only=True)
class Poisoned(Tiny):
    """Fails in some way on a sample whose first number is large."""

    how: str = ""
    has_norm: bool = True
    """Over a batch of one there is none."""

    def model(self) -> nn.Module:
        model = super().model()
        if not self.has_norm:
            model.norm.eval()
        return model

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        is_bad = batch["x"][:, 0] > POISON / 2
        batch = {**batch, "x": torch.where(is_bad.unsqueeze(1), 0.25, batch["x"])}
        loss = super().loss(model, batch)
        if not is_bad.any():
            return loss
        if self.how == "raises":
            raise KeyError(f"row {is_bad.nonzero().tolist()}")
        if self.how == "nan":
            return loss * math.nan
        if self.how == "fails going back":
            return FailsGoingBack.apply(loss)  # type: ignore[no-any-return,no-untyped-call]
        return loss + (loss * 0).sqrt()  # finite; its slope is 0 times infinity


def poisoned_reader() -> MemoryReader:
    columns = tiny_reader().read(range(37))[1]
    columns["x"][BAD, 0] = POISON
    return MemoryReader(columns)


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The virtual worker of each replay that was done."""
    done: list[int] = []
    failure = Replay.failure

    def counted(self: Replay, worker: int, batch: poison.Batch) -> str:
        done.append(worker)
        return failure(self, worker, batch)

    monkeypatch.setattr(Replay, "failure", counted)
    return done


@pytest.mark.parametrize("how", ["raises", "nan", "fails going back", "nan gradient"])
@pytest.mark.parametrize("share", [1, 4, 20])
def test_the_record_that_makes_a_step_fail_is_named(how: str, share: int, replays: list[int]) -> None:
    trainer = make_trainer(
        recipe=Poisoned(how=how, has_norm=share > 1),
        reader=poisoned_reader(),
        preset=tiny_preset(steps=20, virtual_workers=20 // share),
    )
    with pytest.raises(DeterministicError, match=f"record memory:{BAD} makes it fail by itself") as caught:
        step_through(trainer, 2)  # an epoch and more
    assert caught.value.records == (f"memory:{BAD}",)
    assert len(set(replays)) == 1 or how == "nan gradient", "of the virtual worker that failed"
    assert len(replays) <= max_replays(share) + (20 // share - 1 if how == "nan gradient" else 0)


def test_weights_that_are_not_finite_are_blamed_on_no_record() -> None:
    for share in (1, 4):
        trainer = make_trainer(recipe=Poisoned(has_norm=share > 1), preset=tiny_preset(virtual_workers=20 // share))
        step_through(trainer, 1)
        with torch.no_grad():
            next(trainer.state.model.parameters()).fill_(math.nan)
        with pytest.raises(DeterministicError, match="no record is to blame") as caught:
            step_through(trainer, 2)
        assert caught.value.records == ()


@dataclass(frozen=True, kw_only=True)
class FailsOnce(Tiny):
    """As what asks a server does."""

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        if not _failed:
            _failed.append(True)
            raise OSError("away")
        return super().loss(model, batch)


_failed: list[bool] = []


def test_a_failure_that_does_not_come_again_is_not_called_deterministic() -> None:
    """The group begins again; if it then fails alike, the run stops (test_membership)."""
    _failed.clear()
    with pytest.raises(RuntimeError, match="step 1, virtual worker 0: the recipe failed: OSError: away") as caught:
        step_through(make_trainer(recipe=FailsOnce()), 1)
    assert not isinstance(caught.value, DeterministicError)


def test_a_search_that_takes_too_long_is_given_up_and_says_so() -> None:
    replays = iter([True, False])

    def fails(some: Sequence[str]) -> bool:
        found = next(replays, None)
        if found is None:
            raise TimeoutError
        return found

    found = poison.told(DeterministicError("it fails"), fails, ["a", "b", "c", "d"], seconds=3.0)
    assert found is not None
    assert str(found) == "it fails; which record it is was not found within 3 s of replays"
    assert found.records == ()


def test_without_time_for_one_replay_nothing_is_said_of_it() -> None:
    """The group begins again."""
    trainer = make_trainer(recipe=Poisoned(how="nan"), reader=poisoned_reader(), preset=tiny_preset(steps=20))
    trainer.explainer.seconds = -1.0
    with pytest.raises(RuntimeError, match="the loss is nan"):
        step_through(trainer, 2)


def test_replays_change_nothing_of_the_state() -> None:
    trainer = make_trainer(recipe=Poisoned(how="nan"), reader=poisoned_reader(), preset=tiny_preset(steps=20))
    while True:
        before = {name: tensor.clone() for name, tensor in trainer.state.tensors().items()}
        try:
            step_through(trainer, trainer.state.step + 1)
        except DeterministicError:
            break
    after = trainer.settled_state()[1]
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name].numpy(), after[name].numpy()) for name in before)
