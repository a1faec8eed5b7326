"""Which elements of its matrices a rank has, and which recipes are refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from training.checkpoints.state import TrainState
from training.config import ParallelConfig
from training.errors import UserError
from training.parallel.measure import Pretended
from training.parallel.tensor import CutModel, require_cuttable
from training.parallel.tensor_cuts import cuts_of, slices_of
from training.recipe import Cut
from training.recipes.digits import Digits
from training.recipes.stdlib import ByteTransformer, Transformer


def test_parts_are_of_whole_heads_and_make_up_the_matrices() -> None:
    recipe = ByteTransformer(sequence_bytes=8, width=12, num_layers=1, num_heads=6)
    model = recipe.model()
    assert isinstance(model, Transformer)
    attention, feed_forward = cuts_of(recipe, model, 3)
    block = model.blocks[0]
    slices = slices_of(attention) | slices_of(feed_forward)
    cut = [block.qkv.weight, block.qkv.bias, block.out.weight, block.up.weight, block.up.bias, block.down.weight]
    assert set(slices) == set(cut)
    for parameter in cut:
        for number in (1, 2, 3, 6):
            parts = [slices[parameter].part(parameter.detach(), index, number) for index in range(number)]
            assert all(part.shape == slices[parameter].part_shape(number) for part in parts)
            assert sum(part.numel() for part in parts) == parameter.numel()
            assert torch.equal(slices[parameter].joined(parts), parameter.detach())
    queries_keys_values = block.qkv.weight.detach().unflatten(0, (3, 6, 2))
    of_heads_2_and_3 = queries_keys_values[:, 2:4].flatten(0, 2)
    assert torch.equal(slices[block.qkv.weight].part(block.qkv.weight.detach(), 1, 3), of_heads_2_and_3)
    assert torch.equal(slices[block.out.weight].part(block.out.weight.detach(), 1, 3), block.out.weight[:, 4:8])


Change = Callable[[Transformer, list[Cut]], Sequence[Cut]]


@dataclass(frozen=True, kw_only=True)
class Odd(ByteTransformer):
    """What it says of its matrices may be wrong."""

    change: Change = lambda model, cuts: cuts

    def cuts(self, model: nn.Module) -> Sequence[Cut]:
        assert isinstance(model, Transformer)
        return self.change(model, list(super().cuts(model)))


def tied(model: Transformer, cuts: list[Cut]) -> Sequence[Cut]:
    model.blocks[1].up.weight = model.blocks[0].up.weight
    return cuts


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda model, cuts: [], r"add cuts\(model\) to the recipe"),
        (
            lambda model, cuts: [of(cuts[0], num_units=5)],
            r"cuts\(\)\[0\]\.columns \(blocks\.0\.qkv\) gives 48 numbers, .* 3 × 5 units",
        ),
        (lambda model, cuts: [of(cuts[1], rows=model.head, num_units=64)], r"\.rows \(head\) takes 16 numbers"),
        (lambda model, cuts: [of(cuts[0], rows=nn.Linear(16, 16))], r"\.rows must be an nn\.Linear within the model"),
        (lambda model, cuts: [of(cuts[0], columns=model.norm)], r"\.columns must be .* is LayerNorm"),
        (lambda model, cuts: [of(cuts[0], num_repeats=0)], "num_repeats = 0 must be at least 1"),
        (lambda model, cuts: [cuts[0], cuts[0]], r"cuts blocks\.0\.qkv, which is used twice"),
        (
            tied,
            r"cuts blocks\.0\.up\.weight, which is used twice \(\['blocks\.0\.up\.weight', 'blocks\.1\.up\.weight'\]",
        ),
    ],
)
def test_a_recipe_that_cannot_be_cut_is_told_why(change: Change, complaint: str) -> None:
    recipe = Odd(sequence_bytes=8, width=16, num_layers=2, num_heads=4, change=change)
    with pytest.raises(UserError, match=complaint):
        cuts_of(recipe, recipe.model(), 2)


def of(cut: Cut, **changes: Any) -> Cut:
    about: dict[str, Any] = {name: getattr(cut, name) for name in ("columns", "rows", "num_units", "num_repeats")}
    return Cut(**{**about, **changes})


def test_heads_that_the_ranks_do_not_divide_are_refused() -> None:
    recipe = ByteTransformer(sequence_bytes=8, width=18, num_layers=1, num_heads=6)
    with pytest.raises(
        UserError,
        match=r"ByteTransformer\.cuts\(\)\[0\] \(blocks\.0\.qkv, blocks\.0\.out\) has num_units = 6 .*"
        r" parallel\.tensor = 4 does not divide: change either",
    ):
        cuts_of(recipe, recipe.model(), 4)
    with pytest.raises(UserError, match=r"parallel\.tensor = 2 needs to know .* Digits's model"):
        cuts_of(Digits(), Digits().model(), 2)
    with pytest.raises(ValueError, match="width = 10 is no multiple of num_heads = 4"):
        ByteTransformer(width=10).model()


def test_devices_and_blocks_that_do_not_go_with_it() -> None:
    recipe = ByteTransformer(sequence_bytes=8, width=16, num_layers=1, num_heads=2)
    elsewhere = TrainState(recipe, seed=1, device=torch.device("meta"))
    with pytest.raises(UserError, match=r"use parallel\.tensor = 1 on GPUs"):
        require_cuttable(recipe, elsewhere, ParallelConfig(tensor=2))

    @dataclass(frozen=True, kw_only=True)
    class OnePiece(ByteTransformer):
        def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
            return ()

    recipe = OnePiece(sequence_bytes=8, width=16, num_layers=1, num_heads=2)
    with pytest.raises(UserError, match=r"OnePiece\.blocks\(\) gives none, and parallel\.tensor cuts sequences"):
        CutModel(recipe, recipe.model(), Pretended(2), in_sequences=True)
    CutModel(recipe, recipe.model(), Pretended(2), in_sequences=False)


def test_blocks_of_several_tensors_are_refused() -> None:
    recipe = ByteTransformer(sequence_bytes=8, width=16, num_layers=1, num_heads=2)
    model = recipe.model()
    cut = CutModel(recipe, model, Pretended(2), in_sequences=True)
    with pytest.raises(UserError, match=r"a block of the recipe's model takes or gives \['Tensor', 'Tensor'\]"):
        recipe.blocks(model)[0](torch.zeros(1, 8, 16), torch.zeros(1))
    cut.close()
    assert type(recipe.blocks(model)[0].qkv) is nn.Linear
    assert {name: p.shape for name, p in model.named_parameters()} == {
        name: p.shape for name, p in recipe.model().named_parameters()
    }
