"""What is of a shard that has rows of embedding tables: the few rows that a step touches, instead of all.

Bits are those of whole tables: an optimizer that leaves rows without a gradient alone (training.servers.stillness) sees
the touched ones only, with what it keeps of them. (Lazy updates of sparse features: McMahan et al., KDD'13.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from training.arithmetic.norm import BLOCK_ELEMENTS, block_norms, blocks
from training.arithmetic.sparse import Rows, chunks
from training.servers.layout import Piece, Shard

CHUNK_ELEMENTS = 8 * BLOCK_ELEMENTS
"""So many at a time are looked at as a whole: they fit into a cache."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Of a shard: elements of what is no table, laid end to end, and rows of each piece of a table, numbered from the
    piece's first. Of a gradient, all other rows are zeros; of values, as they were."""

    dense: Tensor
    tables: tuple[Rows, ...]

    def add_(self, other: Part) -> Part:
        tables = tuple(own.add_(others) for own, others in zip(self.tables, other.tables, strict=True))
        return Part(dense=self.dense.add_(other.dense), tables=tables)


def dense_pieces(shard: Shard) -> Shard:
    return tuple(piece for piece in shard if not piece.row_elements)


def table_pieces(shard: Shard) -> Shard:
    return tuple(piece for piece in shard if piece.row_elements)


def in_order(shard: Shard, dense: Sequence[Tensor], tables: Sequence[Rows]) -> list[Tensor | Rows]:
    """Of each piece."""
    elements, rows = iter(dense), iter(tables)
    return [next(rows) if piece.row_elements else next(elements) for piece in shard]


def block_norms_of(rows: Rows, piece: Piece) -> Tensor:
    """Those of training.arithmetic.norm of a piece in which all other rows are zeros: a norm's bits hang on the order
    of its additions, so each block is taken whole."""
    num_units = max(1, CHUNK_ELEMENTS // piece.unit_elements)
    rows_per_chunk = num_units * piece.unit_elements // piece.row_elements
    scratch = torch.zeros(min(rows_per_chunk, len(piece.rows)), piece.row_elements)
    found = []
    for part, some in chunks(rows, rows_per_chunk, len(piece.rows)):
        elements = scratch[: len(part)]
        elements[some.numbers] = some.values
        found.append(block_norms([elements]) if len(some.numbers) else _no_norms(elements))
        elements[some.numbers] = 0
    return torch.cat(found)


def _no_norms(elements: Tensor) -> Tensor:
    return torch.zeros(len(blocks(elements.numel())))


@contextmanager
def standing_in(
    optimizer: Optimizer, pieces: Sequence[nn.Parameter], gradients: Sequence[Tensor | Rows]
) -> Iterator[list[nn.Parameter]]:
    """What the optimizer sees meanwhile: a piece, or those of its rows that have a gradient; afterwards the rows are in
    their places again."""
    seen = {
        piece: _Chosen(piece, rows, optimizer)
        for piece, rows in zip(pieces, gradients, strict=True)
        if isinstance(rows, Rows)
    }
    groups = [list(group["params"]) for group in optimizer.param_groups]
    for group, parameters in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = [seen[one].elements if one in seen else one for one in parameters]
    try:
        yield [seen[piece].elements if piece in seen else piece for piece in pieces]
    finally:
        for group, parameters in zip(optimizer.param_groups, groups, strict=True):
            group["params"] = parameters
        for chosen in seen.values():
            chosen.put_back()


class _Chosen:
    """Some rows of a piece and of what the optimizer keeps of it, as a parameter of their own."""

    def __init__(self, piece: nn.Parameter, rows: Rows, optimizer: Optimizer) -> None:
        self._piece, self._numbers, self._width = piece, rows.numbers, rows.values.shape[1]
        self._state: dict[Tensor, Any] = optimizer.state
        self.elements = nn.Parameter(self._taken(piece.detach()))
        if piece in self._state:
            self._state[self.elements] = {
                key: self._taken(value) if _is_like(value, piece) else value
                for key, value in self._state[piece].items()
            }

    def _taken(self, whole: Tensor) -> Tensor:
        return whole.view(-1, self._width)[self._numbers].view(-1)

    def put_back(self) -> None:
        self._put(self._piece.data, self.elements.detach())
        for key, value in self._state.pop(self.elements, {}).items():
            entries = self._state[self._piece]
            if _is_like(value, self.elements):
                if key not in entries:
                    entries[key] = torch.zeros_like(self._piece)
                self._put(entries[key], value)
            else:
                entries[key] = value

    def _put(self, whole: Tensor, elements: Tensor) -> None:
        whole.view(-1, self._width)[self._numbers] = elements.view(-1, self._width)


def _is_like(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape
