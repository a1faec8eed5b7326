"""Which optimizers leave a row without a gradient alone: only these may have tables on servers, row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from training.arithmetic.sparse import Rows
from training.errors import UserError
from training.servers.arithmetic import Decision, TensorState
from training.servers.layout import shards
from training.servers.rows import Part

NUM_ROWS, NUM_COLUMNS = 12, 4
NUM_STEPS, EVERY = 6, 3
"""A row has a gradient in each third step, and none has in one of them."""
_DECISION = Decision(grad_norm=1.0, clip_norm=None, learning_rate_scale=1.0, extras=torch.empty(0))


def require_still(optimizer: Optimizer, tables: Set[Tensor]) -> None:
    """That the optimizer does the same, to the last bit, if it sees of the tables in a step only the rows that have a
    gradient: the others neither move (weight decay, momentum), nor does what is kept of them (a running mean).

    Found out by trying, with the settings of each group that has a table. Raises `UserError` if it does not.
    """
    kind = type(optimizer)
    taken = signature(kind).parameters
    for group in optimizer.param_groups:
        if not tables.isdisjoint(group["params"]):
            settings = {name: value for name, value in group.items() if name in taken and name != "params"}
            if not _is_still(lambda module, values=settings: kind(module.parameters(), **values)):  # type: ignore[misc]
                raise UserError(
                    f"the recipe's optimizer, {kind.__name__}, changes rows of an nn.Embedding(sparse=True) that have"
                    " no gradient, or what it keeps of them, as momentum, weight decay and running means do: parameter"
                    " servers need SGD without these, or Adagrad; or use sparse=False"
                )


def _is_still(make: Callable[[nn.Module], Optimizer]) -> bool:
    whole, by_rows = _Probe(), _Probe()
    states = [
        TensorState(make(module), [module.weight], shards([NUM_ROWS * NUM_COLUMNS], 1, tables)[0])
        for module, tables in ((whole, {}), (by_rows, {0: NUM_COLUMNS}))
    ]
    for rows in _gradients():
        gradient = torch.zeros(NUM_ROWS, NUM_COLUMNS)
        gradient[rows.numbers] = rows.values
        states[0].apply(gradient.view(-1), _DECISION)
        states[1].apply(Part(dense=torch.empty(0), tables=(rows,)), _DECISION)
        if not _are_equal(*(_said(state) for state in states)):
            return False
    return True


def _gradients() -> Iterator[Rows]:
    chance = torch.Generator().manual_seed(0)
    for step in range(NUM_STEPS):
        numbers = torch.arange(step % EVERY, NUM_ROWS if step != NUM_STEPS // 2 else 0, EVERY)
        yield Rows(numbers=numbers, values=torch.randn(len(numbers), NUM_COLUMNS, generator=chance))


def _said(state: TensorState) -> dict[str, Any]:
    snapshot = state.snapshot()
    return {"values": snapshot["values"], **snapshot["optimizer"][0]}


def _are_equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(_is_equal(value, other[key]) for key, value in one.items())


def _is_equal(one: Any, other: Any) -> bool:
    """Zeros have signs."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and one.numpy().tobytes() == other.numpy().tobytes()
    return bool(one == other)


class _Probe(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        values = torch.randn(NUM_ROWS, NUM_COLUMNS, generator=torch.Generator().manual_seed(1))
        values[:2] = -0.0
        self.weight = nn.Parameter(values)
