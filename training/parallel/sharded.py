"""Exact mode with sharded state: a rank keeps a part of weights, gradients and optimizer, and the bits are the same.

Each of the recipe's `blocks` is gathered before it is computed, forward and backward, and emptied after; what is in no
block is gathered once a step. A block's gradients are summed along the tree while the backward pass goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from training.arithmetic.exact import Bucket, Exchange, Group
from training.arithmetic.reduce import Place, TreeSum, places
from training.arithmetic.sparse import have_whole_gradients
from training.errors import UserError
from training.layout import Layout
from training.parallel.scatter import Scatter, ShardGroups
from training.parallel.unit import Unit, units_of


class Sharded:
    """A model of which this rank keeps shards. Its weights are whole until they are freed.

    All ranks gather all blocks in the same order, forward and back: one whose loss leaves a block out, or that has
    fewer virtual workers, gathers it for the others.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        *,
        layout: Layout,
        rank: int,
        groups: ShardGroups,
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Other ranks are waited for inside of `waiting`. Raises `UserError` if a parameter cannot be cut."""
        require_fit(model)
        have_whole_gradients(model)
        self.layout = layout
        self.waiting = waiting
        self.rank = rank
        self.groups = groups
        index = layout.coordinates(rank).shard
        maybe_outside, of_blocks = units_of(model, blocks, index=index, group=groups.gathering)
        self._outside = [maybe_outside] if maybe_outside is not None else []
        self._of_blocks = list(of_blocks.values())
        self.units = [*self._outside, *self._of_blocks]
        self._ahead: list[Unit] = []
        """Of this pass."""
        self._is_going_back = False
        self._maybe_passed: Unit | None = None
        self._is_lent = False
        self._hooks = [block.register_forward_pre_hook(partial(self._enter, unit)) for block, unit in of_blocks.items()]
        self._hooks += [block.register_forward_hook(partial(self._leave, unit)) for block, unit in of_blocks.items()]

    def begin(self) -> None:
        """A virtual worker's forward pass."""
        for unit in self._outside:
            self._gather(unit)
        self._ahead = list(self._of_blocks)

    def go_back(self, backward: Callable[[], None]) -> None:
        """Its backward pass."""
        self._gather_up_to(None)
        self._ahead = list(reversed(self._of_blocks))
        self._is_going_back = True
        try:
            backward()
        finally:
            self._is_going_back = False
        self._free_passed()
        self._gather_up_to(None)

    def skip(self) -> None:
        """The rest of a pass that failed."""
        self._maybe_passed = None
        for unit in self._of_blocks:
            if unit.is_whole:
                unit.free()
        self._gather_up_to(None)

    def stand_by(self) -> None:
        """While others have a virtual worker, and this rank has none."""
        self.begin()
        self.go_back(lambda: None)

    def free(self) -> None:
        """Keep the shards alone."""
        for unit in self.units:
            unit.free()

    @contextmanager
    def lent(self) -> Iterator[dict[nn.Parameter, nn.Parameter]]:
        """Meanwhile, between two steps, the model has whole copies, and each rank may compute it by itself; which is in
        the place of which. Collective at its beginning."""
        copies: dict[nn.Parameter, nn.Parameter] = {}
        with self.waiting():
            for unit in self.units:
                copies |= unit.lend()
        self._is_lent = True
        try:
            yield copies
        finally:
            self._is_lent = False
            self.free()

    def _gather(self, unit: Unit) -> None:
        with self.waiting():
            unit.gather()

    def _gather_up_to(self, maybe_unit: Unit | None) -> None:
        """And have that one alone; None: to the end of the pass."""
        if maybe_unit is not None and maybe_unit not in self._ahead:
            raise UserError(
                "a block of the recipe's model is computed twice, or before another that blocks() names first: name"
                " each once, in the order in which they are computed; and recompute activations of one block at a time"
            )
        while self._ahead:
            unit = self._ahead.pop(0)
            self._gather(unit)
            if unit is maybe_unit:
                return
            unit.free()

    def _enter(self, unit: Unit, block: nn.Module, inputs: Any) -> None:
        """What is computed anew as it goes back is there already."""
        if not (self._is_lent or unit.is_whole):
            self._gather_up_to(unit)

    def _leave(self, unit: Unit, block: nn.Module, inputs: Any, outputs: Any) -> None:
        if self._is_lent:
            return
        tensors = [output for output in tree_leaves(outputs) if isinstance(output, Tensor)]
        if not tensors:
            raise UserError(
                f"a block of the recipe's model returns {type(outputs).__name__}: parallel.shard needs blocks that"
                " return tensors, or tuples, lists or dicts of them"
            )
        for output in tensors:
            if output.requires_grad:
                output.register_hook(partial(self._enter_backwards, unit))  # type: ignore[no-untyped-call]  # no annotation
        if not self._is_going_back:
            unit.free()

    def _enter_backwards(self, unit: Unit, gradient: Tensor) -> None:
        """The block after this one is done, now that this one's output has its gradient."""
        if self._maybe_passed is not unit:
            self._free_passed()
            self._maybe_passed = unit
            self._gather_up_to(unit)

    def _free_passed(self) -> None:
        if self._maybe_passed is not None:
            self._maybe_passed.free()
            self._maybe_passed = None

    def close(self) -> None:
        """Blocks are gathered for nobody any more."""
        for hook in self._hooks:
            hook.remove()


class ShardedReducer:
    """Mean gradients over all virtual workers, each rank's shards of them. Used like `ExactReducer`."""

    def __init__(self, objective: nn.Module, sharded: Sharded, *, num_extras: int, ranges: Sequence[range]) -> None:
        """`ranges` are the virtual workers of each rank, from the first to the last."""
        rank = sharded.rank
        self.owned = ranges[rank]
        self._sharded = sharded
        self._objective = objective
        self._virtual_workers = ranges[-1].stop
        self._places = places(self.owned)
        self._maybe_back: int | None = None
        """The virtual worker whose backward pass has begun."""
        self._num_standing_by = max(len(owned) for owned in ranges) - len(self.owned)
        scatter = Scatter(sharded.layout, ranges, rank, sharded.groups)
        self._gradients = [_Gradients(unit, scatter, self._when_full) for unit in reversed(sharded.units)]
        self._exchange = Exchange(self._gradients, [one.exchange for one in self._gradients])
        group = Group(ranges, rank, sharded.units[0].own.device)
        self._extras = Bucket([], num_extras, group, lambda: None)

    def forward(self, worker: int, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss of one virtual worker's microbatch."""
        self._maybe_back = None
        self._sharded.begin()
        loss: Tensor = self._objective(batch)
        return loss

    def backward(self, worker: int, loss: Tensor, extras: Tensor) -> None:
        """Its gradients. A parameter that the loss does not reach counts as zeros."""
        self._go_back(worker, extras, (loss / self._virtual_workers).backward)

    def give_up(self, worker: int, extras: Tensor) -> None:
        """After `forward` or `backward` failed: the step goes on for the others, with zeros for what is missing."""
        self._sharded.skip()
        if self._maybe_back == worker:
            self._extras.add_extras(extras)
            self._end(worker)
        else:
            self._go_back(worker, extras, lambda: None)

    def _go_back(self, worker: int, extras: Tensor, backward: Callable[[], None]) -> None:
        self._maybe_back = worker
        for one in self._gradients:
            one.begin(self._places[worker])
        self._extras.begin(self._places[worker])
        self._extras.add_extras(extras)
        self._sharded.go_back(backward)
        self._end(worker)

    def _end(self, worker: int) -> None:
        for one in self._gradients:
            one.fill_up()
        self._extras.fill_up()
        if self._places[worker].ends_rank:
            for _ in range(self._num_standing_by):
                self._sharded.stand_by()

    def _when_full(self) -> None:
        self._exchange.start_full_ones()

    def finish(self) -> Tensor:
        """This rank's shards of the mean gradients are there (`gradients`), and of the weights only these; returns the
        sum of all extras."""
        self._exchange.wait()
        self._extras.exchange()
        self._sharded.free()
        for one in self._gradients:
            one.is_full = False
        return self._extras.extras

    def gradients(self) -> dict[Unit, Tensor]:
        """Of each unit, a vector like its `own`."""
        return {one.unit: one.total for one in self._gradients}

    def close(self) -> None:
        """Let the parameters go: another reducer may be made for them."""
        for one in self._gradients:
            one.close()
        self._exchange.close(wait=False)
        self._gradients.clear()


class _Gradients:
    """A unit's: added up along the tree as they come, then this rank's shard of the sum over all ranks."""

    def __init__(self, unit: Unit, scatter: Scatter, when_full: Callable[[], None]) -> None:
        self.unit = unit
        self.is_full = False
        self.total = torch.zeros_like(unit.own)
        self._scatter = scatter
        self._when_full = when_full
        self._missing: set[int] = set()
        self._tree = TreeSum[Tensor]()
        self._rows: list[Tensor] = []
        self._hooks = [
            p.register_post_accumulate_grad_hook(partial(self._arrived, n))  # type: ignore[no-untyped-call]  # no annotation
            for n, p in enumerate(unit.parameters)
        ]

    def begin(self, place: Place) -> None:
        """The next virtual worker. Autograd itself adds a right sibling's gradients to the left one's."""
        self._place = place
        self._missing = set(range(len(self.unit.parameters)))

    def _arrived(self, number: int, parameter: Tensor) -> None:
        if number not in self._missing:
            raise UserError(
                f"a parameter of shape {list(parameter.shape)} gets its gradient in two goes, as under reentrant"
                " activation checkpointing: use torch.utils.checkpoint with use_reentrant=False"
            )
        self._missing.remove(number)
        if not self._missing:
            self._end_leaf()

    def fill_up(self) -> None:
        """Zeros for what the loss did not reach. They are added, not left out: -0 + 0 is 0."""
        for number in list(self._missing):
            parameter = self.unit.parameters[number]
            if parameter.grad is None:
                parameter.grad = torch.zeros(parameter.shape, device=parameter.device)
            else:
                parameter.grad.add_(0.0)
            self._arrived(number, parameter)

    def _end_leaf(self) -> None:
        place = self._place
        if not place.joins_sibling and not place.ends_subtree:
            return  # its sibling comes next
        row = self.unit.empty()
        gradients = [p.grad.reshape(-1) for p in self.unit.parameters if p.grad is not None]
        torch._foreach_copy_(self.unit.views(row), self.unit.slices(gradients))
        for parameter in self.unit.parameters:
            parameter.grad = None
        self._tree.push(int(place.joins_sibling), row)
        if place.ends_subtree:
            self._rows.append(self._tree.total())
        if place.ends_rank:
            self.is_full = True
            self._when_full()

    def exchange(self) -> None:
        """On a thread of its own."""
        rows, self._rows = self._rows, []
        self.total.copy_(self._scatter.scatter(rows))

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for parameter in self.unit.parameters:
            parameter.grad = None


def require_fit(model: nn.Module) -> None:
    """Raises `UserError` naming the parameter."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trained:
        raise UserError("the recipe's model has no parameter to train")
    for name, parameter in trained:
        if parameter.dtype != torch.float32 or not parameter.is_contiguous():
            raise UserError(
                f"the recipe's model has {name} as {parameter.dtype}"
                f"{'' if parameter.is_contiguous() else ', not contiguous in memory'}: parallel.shard needs contiguous"
                " float32 parameters"
            )
