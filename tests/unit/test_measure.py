"""What a model's parts take, found out without elements: the same as with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from tests.unit.tiny import NUM_INPUTS, Tiny
from training.errors import DeterministicError
from training.parallel.measure import _measured, measure
from training.recipes.digits import Digits
from training.recipes.pairs import Words
from training.recipes.stdlib import ByteTransformer

TEXT = {"bytes": np.zeros(17, np.uint8)}
TINY = {"x": np.zeros(NUM_INPUTS, np.float32), "label": np.array(0)}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_transformer_is_measured_without_computing(precision: str) -> None:
    recipe = ByteTransformer(sequence_bytes=16, width=8, num_layers=3, num_heads=2)
    found = measure(recipe, TEXT, batch_size=2, precision=precision)
    batch = {"bytes": torch.zeros(2, 17, dtype=torch.uint8)}
    assert found == _measured(recipe, batch, precision), "with elements it takes as much"
    assert len(found.parts) == 5
    first, *blocks, last = found.parts
    assert first.weight_bytes == 4 * 8 * (256 + 16)
    assert blocks[0] == blocks[1] == blocks[2]
    assert last.weight_bytes == 4 * (8 + 8 + 8 * 256)
    assert all(part.optimizer_bytes == 2 * part.weight_bytes for part in found.parts), "AdamW's two moments"
    assert all(part.output_bytes == 4 * 2 * 16 * 8 for part in found.parts[:-1])
    assert found.weight_bytes == sum(p.nbytes for p in recipe.model().parameters())


def test_matrices_are_cut_as_the_recipe_says() -> None:
    num_bytes = 4 * 2 * 16 * 8
    found = measure(ByteTransformer(sequence_bytes=16, width=8, num_heads=2), TEXT, batch_size=2, precision="float32")
    assert set(found.cut) == {2}
    first, block, _, last = found.cut[2]
    assert (first.weight_bytes, last.weight_bytes) == (found.parts[0].weight_bytes, found.parts[-1].weight_bytes)
    assert block.saved_bytes == found.parts[1].saved_bytes // 2
    assert block.exchanged_bytes == (2 * 5 + 1) * num_bytes // 2, "two pairs of matrices, and the first block's input"


def test_sequences_that_cannot_be_cut_stay_whole() -> None:
    num_bytes = 4 * 2 * 15 * 8
    recipe = ByteTransformer(sequence_bytes=15, width=8, num_heads=2)
    found = measure(recipe, {"bytes": np.zeros(16, np.uint8)}, batch_size=2, precision="float32")
    block = found.cut[2][1]
    assert found.parts[1].saved_bytes // 2 < block.saved_bytes < found.parts[1].saved_bytes
    assert block.exchanged_bytes == 2 * 4 * num_bytes // 2


def test_a_model_without_blocks_is_one_part() -> None:
    found = measure(
        Digits(), {"pixels": np.zeros((8, 8), np.uint8), "label": np.array(1)}, batch_size=2, precision="float32"
    )
    assert len(found.parts) == 1
    assert found.max_stages == 1
    assert found.parts[0].saved_bytes > 0


def test_tables_and_an_optimizer_that_keeps_things_from_the_beginning() -> None:
    recipe = Words(num_rows=64, width=4)
    sample = {"rows": np.arange(2 + recipe.num_others, dtype=np.int32)}
    (part,) = measure(recipe, sample, batch_size=2, precision="float32").parts
    assert part.weight_bytes == 4 * (2 * 64 * 4 + 1)
    assert part.optimizer_bytes == part.weight_bytes + 4, "Adagrad's sum, and the step of what is a number itself"


@dataclass(frozen=True, kw_only=True)
class Looking(Tiny):
    """Its loss hangs on the values."""

    fails: bool = False

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        loss = super().loss(model, batch)
        if self.fails:
            raise ValueError("no")
        return loss * 2 if loss.item() > 1 else loss

    def optimizer(self, model: nn.Module) -> Optimizer:
        return SGD(model.parameters(), lr=0.1, momentum=0.9)


def test_a_recipe_that_looks_at_values_is_computed_after_all() -> None:
    (part,) = measure(Looking(), TINY, batch_size=2, precision="float32").parts
    assert part.weight_bytes == part.optimizer_bytes == 4 * 5 * NUM_INPUTS
    assert part.saved_bytes > 0


def test_the_recipe_s_own_error_is_told() -> None:
    with pytest.raises(DeterministicError, match=r"loss\(\): the recipe failed: ValueError: no"):
        measure(Looking(fails=True), TINY, batch_size=2, precision="float32")
