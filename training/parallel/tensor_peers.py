"""What the ranks that have a part of each matrix say to one another: sums in the order of the ranks, and parts of the
sequence. In a graph, what goes back is the transpose of what goes there (f and g: Shoeybi et al., 2019; along the
sequence: Korthikanti et al., 2022).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from training.errors import UserError

SEQUENCE = 1
"""The dimension of what blocks take and give."""
Tell = Callable[[Tensor], Tensor]
Waiting = Callable[[], AbstractContextManager[None]]


class Peers:
    """This rank's. All compute the same, each with its part, and so say the same kinds of things in the same order."""

    def __init__(self, group: dist.ProcessGroup, *, waiting: Waiting = nullcontext) -> None:
        """Others are waited for inside of `waiting`."""
        self.group = group
        self.number = group.size()
        self.index = group.rank()
        self.waiting = waiting

    def of_all(self, own: Tensor) -> Tensor:
        """Every rank's, in their order: [ranks, *shape]. Collective."""
        found = own.new_empty(self.number, *own.shape)
        with self.waiting():
            dist.all_gather_single(_bytes_of(found), _bytes_of(own.contiguous()), group=self.group)
        return found

    def dealt(self, pieces: Tensor) -> Tensor:
        """Of [ranks, …], a piece for each: what each has for this one, in their order. Collective."""
        found = torch.empty_like(pieces, memory_format=torch.contiguous_format)
        with self.waiting():
            dist.all_to_all_single(_bytes_of(found), _bytes_of(pieces.contiguous()), group=self.group)
        return found

    def summed(self, own: Tensor) -> Tensor:
        """The sum over the ranks, the same bits on each."""
        size = -(-own.numel() // self.number)
        flat = own.new_zeros(self.number * size)
        flat[: own.numel()] = own.reshape(-1)
        total = self.of_all(_in_order(self.dealt(flat.view(self.number, size))))
        return total.view(-1)[: own.numel()].view(own.shape)

    def gathered(self, own: Tensor) -> Tensor:
        """The whole sequence."""
        return self.of_all(own).transpose(0, SEQUENCE).flatten(SEQUENCE, SEQUENCE + 1)

    def own_part(self, whole: Tensor) -> Tensor:
        """Of the sequence."""
        return self._pieces(whole).select(SEQUENCE, self.index).clone(memory_format=torch.contiguous_format)

    def summed_part(self, own: Tensor) -> Tensor:
        """This rank's part of the sequence, summed over the ranks."""
        return _in_order(self.dealt(self._pieces(own).transpose(0, SEQUENCE)))

    def _pieces(self, whole: Tensor) -> Tensor:
        if whole.dim() < 2 or whole.shape[SEQUENCE] % self.number:
            raise UserError(
                f"a block of the recipe's model gets a tensor of shape {list(whole.shape)}: along the sequence, its"
                f" second dimension, it cannot be cut into parallel.tensor = {self.number} parts"
            )
        batch, places, *others = whole.shape
        return whole.reshape(batch, self.number, places // self.number, *others)


def _bytes_of(tensor: Tensor) -> Tensor:
    """Backends know few kinds of numbers."""
    return tensor.view(-1).view(torch.uint8)


def _in_order(terms: Tensor) -> Tensor:
    """Rounded to bfloat16 once, if that is what they are."""
    total = terms[0].float()
    for term in terms[1:]:
        total = total + term
    return total.to(terms.dtype)


def same(tensor: Tensor) -> Tensor:
    return tensor.view_as(tensor)


def tell(tensor: Tensor, there: Tell, back: Tell) -> Tensor:
    """`there` forward, and `back` with the gradient."""
    found: Tensor = _Told.apply(tensor, there, back)  # type: ignore[no-untyped-call]  # torch has no annotation here
    return found


class _Told(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, there: Tell, back: Tell) -> Tensor:
        ctx.back = back
        return there(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(gradient), None, None


class OfWholeSequence(torch.autograd.Function):
    """A linear layer of the sequence that ranks have in parts. What is kept for the way back is a part, which is
    gathered again."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, weight: Tensor, bias: Tensor | None, peers: Peers) -> Tensor:
        ctx.save_for_backward(own, weight)
        ctx.peers = peers
        return F.linear(peers.gathered(own), weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        own, weight = ctx.saved_tensors
        wants_own, wants_weight, wants_bias, _ = ctx.needs_input_grad
        rows = gradient.flatten(0, -2)
        whole = ctx.peers.gathered(own).flatten(0, -2) if wants_weight else None
        return (
            ctx.peers.summed_part(gradient @ weight) if wants_own else None,
            rows.t() @ whole if whole is not None else None,
            rows.sum(0) if wants_bias else None,
            None,
        )
