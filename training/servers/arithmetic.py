"""A shard's parameters and optimizer, and what workers decide of a step. The bits are exact mode's."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from training.arithmetic.norm import BLOCK_ELEMENTS, block_norms, clip_factor, norm_of
from training.arithmetic.reduce import Subtree, fold
from training.arithmetic.sparse import Rows
from training.checkpoints.optimizer_state import changed_settings, settings_of
from training.errors import UserError
from training.servers.layout import Piece, Shard, shards
from training.servers.rows import Part, block_norms_of, dense_pieces, in_order, standing_in, table_pieces

NUM_PROBE_STEPS, NUM_PROBE_SHARDS, NUM_PROBE_COLUMNS = 3, 3, 8


@dataclass(frozen=True, kw_only=True)
class Report:
    """Of a shard's total, to all workers."""

    norms: Tensor
    """Of its blocks."""
    extras: Tensor
    """What else was summed (training.arithmetic.extras); of the first shard only, empty in others."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The same in all workers: each makes it of all shards' reports."""

    grad_norm: float
    clip_norm: float | None
    learning_rate_scale: float
    extras: Tensor
    """The sum of what was summed beside gradients: who joins after the step hears of it so."""


def decide(reports: Sequence[Report], *, clip_norm: float | None, learning_rate_scale: float) -> Decision:
    """Reports in the order of shards, so blocks are in that of parameters, as in training.loop."""
    norm = norm_of(torch.cat([report.norms for report in reports]))
    return Decision(
        grad_norm=norm,
        clip_norm=clip_norm,
        learning_rate_scale=learning_rate_scale,
        extras=reports[0].extras.clone(),
    )


class TensorState:
    """One shard, as training.servers.replica wants it. Totals are vectors: the pieces' mean gradients, end to end, and
    the extras; or a `Part` of them, if the shard has rows of tables."""

    def __init__(self, optimizer: Optimizer, parameters: Sequence[nn.Parameter], shard: Shard) -> None:
        """Takes the recipe's optimizer of all `parameters`, as it is before the first step, for the shard alone."""
        self.step = 0
        self._shard = shard
        self._dense, self._tables = dense_pieces(shard), table_pieces(shard)
        self._num_elements = sum(piece.num_elements for piece in self._dense)
        self._touched = tuple(torch.empty(0, dtype=torch.int64) for _ in self._tables)
        """Of each piece of a table: the rows that the last step changed."""
        self._maybe_changes: weakref.ref[Tensor | Part] | None = None
        """Made once for all who ask, as long as one of them has it."""
        self.optimizer = optimizer
        self._pieces = sliced(optimizer, parameters, shard)

    def fold(self, parts: Sequence[tuple[Subtree, Tensor]] | Sequence[tuple[Subtree, Part]]) -> Tensor | Part:
        return fold([subtree for subtree, _ in parts], [part for _, part in parts])

    def with_said(self, total: Tensor | Part, said: Tensor) -> Tensor | Part:
        dense = total.dense if isinstance(total, Part) else total
        dense[self._num_elements :] += said
        return total

    def report(self, total: Tensor | Part) -> Report:
        norms = [
            block_norms_of(each, piece) if isinstance(each, Rows) else block_norms([each])
            for piece, each in zip(self._shard, self._gradients(total), strict=True)
        ]
        dense = total.dense if isinstance(total, Part) else total
        return Report(norms=joined(norms), extras=dense[self._num_elements :])

    def apply(self, total: Tensor | Part, decision: Decision) -> None:
        factor = clip_factor(decision.grad_norm, decision.clip_norm)
        gradients = self._gradients(total)
        elements = [_elements(each).clone() for each in gradients]  # `total` may still be on its way to a backup
        if factor is not None and elements:
            torch._foreach_mul_(elements, factor)
        for group in self.optimizer.param_groups:
            group.setdefault("peak_lr", group["lr"])
            group["lr"] = group["peak_lr"] * decision.learning_rate_scale
        with standing_in(self.optimizer, self._pieces, gradients) as seen:
            for one, gradient in zip(seen, elements, strict=True):
                one.grad = gradient
            self.optimizer.step()
        self._touched = tuple(each.numbers.clone() for each in gradients if isinstance(each, Rows))
        self._maybe_changes = None
        self.step += 1

    def _gradients(self, total: Tensor | Part) -> list[Tensor | Rows]:
        """Of each piece."""
        if isinstance(total, Part):
            return in_order(self._shard, split(total.dense[: self._num_elements], self._dense), total.tables)
        return list(split(total[: self._num_elements], self._shard))

    def values(self) -> Tensor:
        """The pieces' elements, end to end."""
        return joined([piece.detach() for piece in self._pieces])

    def changes(self) -> Tensor | Part:
        """What the last step changed of them. Nobody may change it."""
        found = self._maybe_changes() if self._maybe_changes is not None else None
        if found is None:
            found = self._new_changes()
            self._maybe_changes = weakref.ref(found)
        return found

    def _new_changes(self) -> Tensor | Part:
        if not self._tables:
            return self.values()
        dense, tables, touched = [], [], iter(self._touched)
        for piece, elements in zip(self._shard, self._pieces, strict=True):
            if piece.row_elements:
                numbers = next(touched)
                tables.append(Rows(numbers=numbers, values=elements.detach().view(-1, piece.row_elements)[numbers]))
            else:
                dense.append(elements.detach())
        return Part(dense=joined(dense), tables=tuple(tables))

    def snapshot(self) -> dict[str, Any]:
        state = {
            number: {key: _copied(value) for key, value in self.optimizer.state.get(piece, {}).items()}
            for number, piece in enumerate(self._pieces)
        }
        return {"values": self.values(), "optimizer": state, "touched": self._touched}

    def num_bytes(self) -> int:
        """Of a snapshot and of a total."""
        kept = (value for entries in self.optimizer.state.values() for value in entries.values())
        num_kept = sum(value.nbytes for value in kept if isinstance(value, Tensor))
        return 2 * sum(piece.nbytes for piece in self._pieces) + num_kept

    def load(self, snapshot: Mapping[str, Any], step: int) -> None:
        values = split(snapshot["values"], self._shard)
        self._touched = tuple(snapshot["touched"])
        self._maybe_changes = None
        for number, (piece, value) in enumerate(zip(self._pieces, values, strict=True)):
            piece.data.copy_(value)
            entries = snapshot["optimizer"][number]
            self.optimizer.state[piece] = {key: _copied(value) for key, value in entries.items()}
        self.step = step


def pieces_of(tensors: Sequence[Tensor], shard: Shard, *others: Tensor) -> Tensor:
    """A shard's elements of tensors like the parameters, end to end, and other vectors after them: copied once."""
    return joined([*(_slice(tensors[piece.parameter], piece) for piece in shard), *others])


def part_of(gradients: Mapping[int, Tensor | Rows], shard: Shard, extras: Sequence[Tensor] = ()) -> Tensor | Part:
    """What a shard gets of gradients of its parameters, by their numbers, those of tables as rows; the extras are laid
    after it."""
    dense: list[Tensor] = []
    tables: list[Rows] = []
    for piece in shard:
        gradient = gradients[piece.parameter]
        if isinstance(gradient, Rows):
            tables.append(gradient.within(piece.rows))
        else:
            dense.append(_slice(gradient, piece))
    vector = joined([*dense, *extras])
    return Part(dense=vector, tables=tuple(tables)) if tables else vector


def put(values: Tensor | Part, shard: Shard, parameters: Sequence[Tensor]) -> None:
    """Into the parameters, what `TensorState` says of a shard."""
    if isinstance(values, Part):
        for piece, rows in zip(table_pieces(shard), values.tables, strict=True):
            _slice(parameters[piece.parameter], piece).view(-1, piece.row_elements)[rows.numbers] = rows.values
        put(values.dense, dense_pieces(shard), parameters)
        return
    for piece, elements in zip(shard, split(values, shard), strict=True):
        _slice(parameters[piece.parameter], piece).copy_(elements)


def split(vector: Tensor, shard: Shard) -> tuple[Tensor, ...]:
    """The inverse: each piece's elements, not copied."""
    return torch.split(vector, [piece.num_elements for piece in shard]) if shard else ()


def joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if parts else torch.empty(0)


def _elements(gradient: Tensor | Rows) -> Tensor:
    return gradient.values.reshape(-1) if isinstance(gradient, Rows) else gradient


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def sliced(optimizer: Optimizer, parameters: Sequence[nn.Parameter], shard: Shard) -> list[nn.Parameter]:
    """Have the optimizer see the shard's pieces, copied, in the place of the parameters. Returns them."""
    found = [nn.Parameter(_slice(parameters[piece.parameter].detach(), piece).clone()) for piece in shard]
    of_parameter: dict[Tensor, list[tuple[Piece, nn.Parameter]]] = {}
    for piece, part in zip(shard, found, strict=True):
        of_parameter.setdefault(parameters[piece.parameter], []).append((piece, part))
    state = dict(optimizer.state)
    optimizer.state.clear()
    for parameter, entries in state.items():
        for piece, part in of_parameter.get(parameter, []):
            optimizer.state[part] = {
                key: _slice(value, piece).clone() if _is_like(value, parameter) else _copied(value)
                for key, value in entries.items()
            }
    for group in optimizer.param_groups:
        group["params"] = [part for parameter in group["params"] for _, part in of_parameter.get(parameter, [])]
    return found


def _slice(tensor: Tensor, piece: Piece) -> Tensor:
    return tensor.reshape(-1)[piece.start : piece.stop]


def _is_like(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape


def require_elementwise(make: Callable[[nn.Module], Optimizer]) -> None:
    """That the optimizer that `make` makes of a module's parameters treats each element by itself, to the last bit, and
    keeps nothing elsewhere.

    Found out by trying: three steps of a matrix, whole and cut. Raises `UserError` if the results differ.
    """
    size = NUM_PROBE_SHARDS * BLOCK_ELEMENTS
    chance = torch.Generator().manual_seed(0)
    first = torch.randn(size // NUM_PROBE_COLUMNS, NUM_PROBE_COLUMNS, generator=chance)
    gradients = torch.randn(NUM_PROBE_STEPS, size, generator=chance)
    whole = _Probe(first)
    optimizer = make(whole)
    first_settings = settings_of(optimizer)
    for gradient in gradients:
        whole.weight.grad = gradient.view_as(first).clone()
        optimizer.step()
    if changed := changed_settings(optimizer, first_settings):
        raise UserError(_refusal(optimizer, f"keeps {min(changed)} beside what it has of parameters"))
    if not torch.equal(whole.weight.detach().reshape(-1), _stepped_in_pieces(make, first, gradients)):
        raise UserError(_refusal(optimizer, "gives other bits if a parameter is cut in pieces"))


def _stepped_in_pieces(make: Callable[[nn.Module], Optimizer], first: Tensor, gradients: Tensor) -> Tensor:
    found = []
    for shard in shards([first.numel()], NUM_PROBE_SHARDS):
        module = _Probe(first)
        state = TensorState(make(module), [module.weight], shard)
        for gradient in gradients:
            state.apply(pieces_of([gradient], shard), _PROBE_DECISION)
        found.append(state.values())
    return torch.cat(found)


def _refusal(optimizer: Optimizer, why: str) -> str:
    return (
        f"the recipe's optimizer, {type(optimizer).__name__}, {why}: parameter servers and parallel.shard need one that"
        " treats each element by itself; or use train.strategy = 'all_reduce' and parallel.shard = 1"
    )


_PROBE_DECISION = Decision(grad_norm=1.0, clip_norm=None, learning_rate_scale=1.0, extras=torch.empty(0))


class _Probe(nn.Module):
    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(values.clone())
