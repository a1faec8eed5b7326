"""Whether chunks make of a batch what the whole model makes of it: tried with one, there and back, as in a pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from training.arithmetic.objective import Objective, recipe_errors, seed_streams
from training.arithmetic.streams import streams_now
from training.errors import UserError
from training.parallel.chunk import Chunk, as_values
from training.parallel.parts import Rest, Values
from training.parallel.passing import Form
from training.parallel.trial import Made, Trial
from training.recipe import Recipe


class PipelineTrial(Trial):
    """In one process."""

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        chunks: Sequence[nn.Module],
        batch: Mapping[str, Tensor],
        *,
        precision: str,
    ) -> None:
        super().__init__(recipe, model, batch, precision=precision)
        self._chunks = chunks

    def require_same(self) -> None:
        """Raises `UserError` unless loss, gradients and buffers are the same bits."""
        try:
            whole = self._made_whole()
            self.restore()
            cut = self._made_in_chunks()
        finally:
            self.restore()
        self._compare(whole, cut)

    def _made_whole(self) -> Made:
        made, (_, of_loss, last) = self.computed("loss() of held-out samples, with which a pipeline is tried")
        if not torch.equal(of_loss, last):
            raise UserError(
                f"{self.name}'s model draws random numbers in its backward pass: in a pipeline other microbatches have"
                " drawn before; draw them in the forward pass, or let torch.utils.checkpoint preserve its state"
            )
        return made

    def _made_in_chunks(self) -> Made:
        chunks, where = (
            [Chunk(module) for module in self._chunks],
            "parts(), each from what the one before gave, unchanged",
        )
        seed_streams(0, self.device)
        with recipe_errors(where):
            inputs = [self.recipe.inputs(self.batch)]
            for chunk in chunks[:-1]:
                outputs = chunk.forward(0, inputs, partial(self._computed, chunk, inputs))
                inputs = [_sent(output) for output in outputs]
        loss = self._loss(chunks[-1], inputs)
        for chunk in chunks:
            chunk.hang_buffers_of(0)
        buffers, given = self.buffers.current(), chunks[-1].backward(0, [None])
        with recipe_errors(f"the backward pass of {where}"):
            for chunk in reversed(chunks[:-1]):
                given = chunk.backward(0, given)
        return Made(loss=loss, buffers=buffers, gradients=self.gradients())

    def _computed(self, chunk: Chunk, inputs: Sequence[Tensor]) -> Values:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bfloat16"):
            found: Values = chunk.module(as_values(inputs))
        return found

    def _loss(self, last: Chunk, inputs: Sequence[Tensor]) -> Tensor:
        rest, streams = Rest(self.recipe, last.module, self.device), streams_now(self.device)
        seed_streams(0, self.device)
        where = "loss() with the last of its parts() in the model's place, of what those before gave, unchanged"
        with recipe_errors(where):
            rest.begin(as_values(inputs), streams, self.batch)
            objective = Objective(self.recipe, rest, precision=self.precision)
            (loss,) = last.forward(0, inputs, lambda: objective(self.batch))
        return loss.detach()

    def _compare(self, whole: Made, cut: Made) -> None:
        if not _same(whole.loss, cut.loss):
            raise UserError(
                f"{self.name}.parts() one after another give a loss of {cut.loss.item()}, and the model gives"
                f" {whole.loss.item()}: they must be all that the model computes"
            )
        for name, gradient in whole.gradients.items():
            if not _same(gradient, cut.gradients[name]):
                raise UserError(
                    f"{self.name}.parts() one after another give {name} another gradient than the model does: they"
                    " must be all that the model computes, hooks and what is detached included"
                )
        if not all(map(_same, whole.buffers, cut.buffers)):
            raise UserError(f"{self.name}.parts() one after another make other buffers than the model does")


def _sent(output: Tensor) -> Tensor:
    """As the next stage has it."""
    return Form.of(output).placed(output.detach().clone(memory_format=torch.contiguous_format))


def _same(one: Tensor, other: Tensor) -> bool:
    """What is no number is the same as what is none."""
    return torch.equal(one.nan_to_num(), other.nan_to_num()) and torch.equal(one.isnan(), other.isnan())
