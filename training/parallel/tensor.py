"""Tensor parallelism: ranks have a part of each matrix that the recipe lets be cut, and compute virtual workers
together; what is between these matrices, each computes for a part of the sequence.
(Megatron-LM: Shoeybi et al., 2019; sequence parallelism: Korthikanti et al., 2022.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from training.arithmetic.exact import require_float32
from training.arithmetic.objective import recipe_errors
from training.checkpoints.state import TrainState
from training.config import ParallelConfig
from training.errors import UserError
from training.parallel.tensor_cuts import cuts_of, slices_of
from training.parallel.tensor_peers import OfWholeSequence, Peers, same, tell
from training.recipe import Recipe
from training.servers.attached import require_divisible


def require_cuttable(recipe: Recipe, state: TrainState, parallel: ParallelConfig) -> None:
    """Raises `UserError` naming what cannot be cut, before anything is."""
    model = state.model
    if next(model.parameters()).device.type != "cpu":
        raise UserError("parallel.tensor was tried on processors alone so far: use parallel.tensor = 1 on GPUs")
    require_float32([p for p in model.parameters() if p.requires_grad])
    cuts_of(recipe, model, parallel.tensor)
    if parallel.sequences == "parts":
        blocks_of(recipe, model)
    require_elementwise(state.optimizer)


def require_elementwise(optimizer: Optimizer) -> None:
    """Raises `UserError` for one whose state cannot be cut."""
    try:
        require_divisible(optimizer)
    except UserError as error:
        raise UserError(f"parallel.tensor cuts parameters as parallel.shard does: {error}") from error


def blocks_of(recipe: Recipe, model: nn.Module) -> list[nn.Module]:
    """Between the first and the last of which sequences are in parts."""
    with recipe_errors("blocks()"):
        blocks = list(recipe.blocks(model))
    if not blocks:
        raise UserError(
            f"{type(recipe).__name__}.blocks() gives none, and parallel.tensor cuts sequences from the first block to"
            ' the last: add blocks(model), or set parallel.sequences = "whole"'
        )
    return blocks


NOTHING: Mapping[Tensor, nn.Parameter] = {}


class CutModel:
    """A model of which this rank has a part of each matrix; of one part it is the model. It is whole while it is
    lent."""

    def __init__(
        self, recipe: Recipe, model: nn.Module, peers: Peers, *, in_sequences: bool, maybe_settling: Peers | None = None
    ) -> None:
        """`in_sequences`: between the matrices of a block, ranks have parts of the sequence. `maybe_settling` are the
        same peers, for all that they say outside of the model. Takes the weights, which are whole, and keeps parts.
        Raises `UserError` for a model that cannot be cut."""
        is_cut = peers.number > 1
        cuts = cuts_of(recipe, model, peers.number) if is_cut else []
        blocks = blocks_of(recipe, model) if is_cut and in_sequences else []
        self.peers = maybe_settling or peers
        self._computing = peers
        self.slices = {p: slices for cut in cuts for p, slices in slices_of(cut).items()}
        in_blocks = {module for block in blocks for module in block.modules()}
        stand_ins: dict[nn.Module, nn.Module] = {}
        for cut in cuts:
            stand_ins[cut.columns] = ByColumns(cut.columns, peers, in_sequences=cut.columns in in_blocks)
            stand_ins[cut.rows] = ByRows(cut.rows, peers, in_sequences=cut.rows in in_blocks)
        self._places = [
            (owner, key, module, stand_ins[module])
            for owner in model.modules()
            for key, module in owner._modules.items()
            if module in stand_ins
        ]
        self.partly_summed = [
            p for p in dict.fromkeys(p for block in blocks for p in block.parameters()) if p not in self.slices
        ]
        """Of the gradients of these, each rank has what its part of the sequence adds."""
        self._ends = (blocks[0], blocks[-1]) if blocks else None
        self._hooks: list[Any] = []
        for parameter, slices in self.slices.items():
            parameter.data = slices.part(parameter.data, peers.index, peers.number)
        self._hang_parts()

    @contextmanager
    def lent(self) -> Iterator[dict[Tensor, nn.Parameter]]:
        """Meanwhile, between two steps, the model has whole copies, and each rank may compute it by itself; which is in
        the place of which. Collective at its beginning."""
        copies = {p: nn.Parameter(self.joined(p, p.data), p.requires_grad) for p in self.slices}
        self._hang_wholes(copies)
        try:
            yield copies
        finally:
            self._hang_wholes()
            self._hang_parts()

    def joined(self, parameter: Tensor, part: Tensor) -> Tensor:
        """From each rank's part, of the weights or of something like them. Collective."""
        return self.slices[parameter].joined(self.peers.of_all(part).unbind())

    def sum_partly_summed(self) -> None:
        """Gradients of what is not cut, where sequences are. Collective."""
        gradients = [p.grad for p in self.partly_summed if p.grad is not None]
        if gradients:
            total = self.peers.summed(torch.cat([gradient.reshape(-1) for gradient in gradients]))
            parts = torch.split(total, [gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view(gradient.shape))

    def _hang_parts(self) -> None:
        for owner, key, _, part in self._places:
            owner._modules[key] = part
        if self._ends:
            first, last = self._ends
            self._hooks = [first.register_forward_pre_hook(self._enter), last.register_forward_hook(self._leave)]

    def _hang_wholes(self, copies: Mapping[Tensor, nn.Parameter] = NOTHING) -> None:
        """With copies of parameters, or with these themselves."""
        for owner, key, whole, part in self._places:
            owner._modules[key] = whole
            for name, parameter in part._parameters.items():
                whole._parameters[name] = copies.get(parameter, parameter) if parameter is not None else None
        for hook in self._hooks:
            hook.remove()

    def _enter(self, block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (tell(_one_tensor(inputs), self._computing.own_part, self._computing.gathered),)

    def _leave(self, block: nn.Module, inputs: Any, outputs: Any) -> Tensor:
        return tell(_one_tensor((outputs,)), self._computing.gathered, self._computing.own_part)

    def close(self) -> None:
        """The model is as it was, and its weights are whole. Collective."""
        for parameter in self.slices:
            parameter.data = self.joined(parameter, parameter.data)
        self._hang_wholes()


def _one_tensor(given: Sequence[Any]) -> Tensor:
    if len(given) == 1 and isinstance(given[0], Tensor):
        return given[0]
    raise UserError(
        f"a block of the recipe's model takes or gives {[type(one).__name__ for one in given]}: where parallel.tensor"
        " cuts sequences it must be one tensor, of [batch, sequence, …]"
    )


class InPart(nn.Module):
    """In the place of a linear layer, with the parameters of which this rank has a part."""

    def __init__(self, linear: nn.Linear, peers: Peers, *, in_sequences: bool) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self._peers = peers
        self._in_sequences = in_sequences


class ByColumns(InPart):
    """This rank's units, of all of the input."""

    def forward(self, x: Tensor) -> Tensor:
        if not self._in_sequences:
            return F.linear(tell(as_autocast(x), same, self._peers.summed), self.weight, self.bias)
        own, weight = as_autocast(x), as_autocast(self.weight)
        maybe_bias = None if self.bias is None else as_autocast(self.bias)
        found: Tensor = OfWholeSequence.apply(own, weight, maybe_bias, self._peers)  # type: ignore[no-untyped-call]  # no annotation
        return found


class ByRows(InPart):
    """What all ranks make of their units, summed; and the bias, once."""

    def forward(self, x: Tensor) -> Tensor:
        own = F.linear(x, self.weight)
        if self._in_sequences:
            total = tell(own, self._peers.summed_part, self._peers.gathered)
        else:
            total = tell(own, self._peers.summed, same)
        return total if self.bias is None else total + as_autocast(self.bias)


def as_autocast(tensor: Tensor) -> Tensor:
    """As torch has it before a product; here before it travels, too."""
    kind = tensor.device.type
    is_on = torch.is_autocast_enabled(kind) and tensor.is_floating_point()
    return tensor.to(torch.get_autocast_dtype(kind)) if is_on else tensor
