"""Gradients of embedding tables: the rows that a batch looked up, with the bits of the whole tables.

A table is the weight of an `nn.Embedding` with `sparse=True`. Its gradient has zeros in all rows that were not looked
up; here these are left out, and every sum is that of whole gradients, restricted to the rows that either term has: so
it has their bits. (Sparse pushes: Li et al., OSDI'14.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from training.arithmetic.reduce import TreeSum, places
from training.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Some rows of a table. Of a gradient all others are zeros."""

    numbers: Tensor
    """Ascending, int64."""
    values: Tensor
    """Shape [rows, width]."""

    def add_(self, other: Rows) -> Rows:
        """The sum: a row that one of them lacks is one of zeros, which are added and not left out, as -0 + 0 is 0."""
        numbers = torch.unique(torch.cat([self.numbers, other.numbers]))
        return Rows(numbers=numbers, values=self._among(numbers).add_(other._among(numbers)))

    def _among(self, numbers: Tensor) -> Tensor:
        values = self.values.new_zeros(len(numbers), self.values.shape[1])
        values[torch.searchsorted(numbers, self.numbers)] = self.values
        return values

    def within(self, part: range) -> Rows:
        """Those of a part of the table, numbered from its start, not copied."""
        bounds = self.numbers.new_tensor([part.start, part.stop])
        start, stop = torch.searchsorted(self.numbers, bounds).tolist()
        return Rows(numbers=self.numbers[start:stop] - part.start, values=self.values[start:stop])


def tables_of(module: nn.Module) -> list[nn.Parameter]:
    """The tables that are trained, in the order of the module's parameters.

    Raises `UserError` for one that changes as it is looked up.
    """
    found = set()
    for embedding in embeddings_of(module):
        if embedding.max_norm is not None:
            raise UserError("an embedding with max_norm changes its rows in the forward pass: leave max_norm out")
        found.add(embedding.weight)
    return [parameter for parameter in module.parameters() if parameter in found]


def have_whole_gradients(module: nn.Module) -> None:
    """Of tables too, from here on: there is nobody whom rows could be sent to."""
    for embedding in embeddings_of(module):
        embedding.sparse = False


def embeddings_of(module: nn.Module) -> list[nn.Embedding]:
    """Whose weights are tables."""
    found = [one for one in module.modules() if isinstance(one, nn.Embedding)]
    return [one for one in found if one.sparse and one.weight.requires_grad]


def rows_of(gradient: Tensor) -> Rows:
    """Of a sparse gradient. What was looked up more than once is added up in its order, from 0, as a dense gradient
    is."""
    numbers, where = torch.unique(gradient._indices()[0], return_inverse=True)
    values = gradient._values()
    return Rows(numbers=numbers, values=values.new_zeros(len(numbers), values.shape[1]).index_add_(0, where, values))


class RowSums:
    """What one rank's virtual workers give each table, added up along the tree (training.arithmetic.reduce)."""

    def __init__(self, module: nn.Module, owned: range) -> None:
        """Of the module's tables."""
        self._tables = tables = tables_of(module)
        self._num_looked_up: dict[Tensor, int] = {}
        """Rows, by this virtual worker."""
        self._places = places(owned)
        self._trees = [TreeSum[Rows]() for _ in tables]
        self._arrived: dict[int, Rows] = {}
        self._sums: list[list[Rows]] = []
        self._hooks = [
            table.register_post_accumulate_grad_hook(partial(self._arrive, number))  # type: ignore[no-untyped-call]  # no annotation
            for number, table in enumerate(tables)
        ] + [embedding.register_forward_hook(self._look_up) for embedding in embeddings_of(module)]

    def _look_up(self, embedding: nn.Embedding, inputs: tuple[Tensor], output: Tensor) -> None:
        """Of two gradients of one table nobody knows afterwards which row is of which: whole ones are added as they
        are, so these would have other bits."""
        table = embedding.weight
        if not output.requires_grad:
            return
        if table in self._num_looked_up:
            raise UserError(
                f"a table of shape {list(table.shape)} is looked up twice for one loss: look up all rows at"
                " once (torch.cat their numbers), or use sparse=False"
            )
        self._num_looked_up[table] = inputs[0].numel()

    def _arrive(self, number: int, table: Tensor) -> None:
        gradient, table.grad = table.grad, None
        num_looked_up = self._num_looked_up.get(table, 0)
        if gradient is None or not gradient.is_sparse or gradient._nnz() > num_looked_up or number in self._arrived:
            raise UserError(
                f"a table of shape {list(table.shape)} is used otherwise than by looking rows up: use sparse=False"
            )
        self._arrived[number] = rows_of(gradient)

    def end_worker(self, worker: int) -> None:
        """After its backward pass. A table that the loss does not reach has no rows."""
        self._num_looked_up.clear()
        for number, (table, tree) in enumerate(zip(self._tables, self._trees, strict=True)):
            tree.push(0, self._arrived.pop(number) if number in self._arrived else _no_rows(table))
        if self._places[worker].ends_subtree:
            self._sums.append([tree.total() for tree in self._trees])

    def take(self) -> list[list[Rows]]:
        """Of each of this rank's subtrees: the rows of each table. Begins anew."""
        sums, self._sums = self._sums, []
        return sums

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _no_rows(table: Tensor) -> Rows:
    return Rows(numbers=torch.empty(0, dtype=torch.int64), values=table.new_empty(0, table.shape[1]))


def chunks(rows: Rows, size: int, num_rows: int) -> Iterator[tuple[range, Rows]]:
    """The rows of each `size` neighbours of a table of `num_rows`, numbered from their start."""
    starts = range(0, num_rows, size)
    cuts = torch.searchsorted(rows.numbers, rows.numbers.new_tensor([*starts, num_rows])).tolist()
    for start, begin, end in zip(starts, cuts[:-1], cuts[1:], strict=True):
        part = range(start, min(start + size, num_rows))
        yield part, Rows(numbers=rows.numbers[begin:end] - start, values=rows.values[begin:end])
