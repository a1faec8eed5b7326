"""How a recipe's model is cut into chunks, and which ones are refused."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.unit.tiny import CPU, Tiny
from training.arithmetic.objective import seed_streams
from training.arithmetic.streams import set_streams, streams_now
from training.config import ParallelConfig
from training.errors import DeterministicError, UserError
from training.layout import Layout
from training.parallel.chunk import Chunk, as_tuple
from training.parallel.parts import chunks_of
from training.parallel.pipeline import require_cut
from training.parallel.pipeline_trial import PipelineTrial
from training.parallel.replica import make_replica_groups
from training.parallel.state_in_stages import require_separable
from training.recipe import Recipe
from training.recipes.digits import Digits
from training.recipes.stdlib import ByteTransformer

BATCH = {"x": torch.linspace(-1, 1, 20).view(4, 5), "label": torch.tensor([0, 1, 2, 0])}
Select = Callable[[Sequence[nn.Module]], Sequence[nn.Module]]
Loss = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Stack(Tiny):
    """Two matrices between two others; what it says of them may be wrong."""

    tied: bool = False
    select_blocks: Select = lambda found: found[1:-1]
    select_parts: Select = lambda found: found
    of_model: Loss = lambda model, x: model(x)

    def model(self) -> nn.Module:
        layers = [nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)]
        if self.tied:
            layers[2].weight = layers[0].weight
        return nn.Sequential(layers[0], nn.Sequential(layers[1], nn.Tanh()), layers[2], layers[3])

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        assert isinstance(model, nn.Sequential)
        return self.select_blocks(list(model))

    def parts(self, model: nn.Module) -> Sequence[nn.Module]:
        assert isinstance(model, nn.Sequential)
        return self.select_parts(list(model))

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return F.cross_entropy(self.of_model(model, self.inputs(batch)), batch["label"])


def cut(recipe: Recipe, number: int = 2, batch: Mapping[str, Tensor] = BATCH) -> list[nn.Sequential]:
    seed_streams(0, CPU)
    model = recipe.model()
    chunks = chunks_of(recipe, model, number)
    before = [tensor.clone() for tensor in model.state_dict().values()]
    PipelineTrial(recipe, model, chunks, batch, precision="float32").require_same()
    assert all(map(torch.equal, before, model.state_dict().values()))
    assert all(p.grad is None for p in model.parameters())
    return chunks


def test_parts_are_cut_where_blocks_begin() -> None:
    assert [len(chunk) for chunk in cut(Stack())] == [2, 2]
    recipe = ByteTransformer(sequence_bytes=8, width=16, num_layers=5, num_heads=2)
    texts = {"bytes": torch.arange(18, dtype=torch.uint8).view(2, 9)}
    assert [len(chunk) for chunk in cut(recipe, 3, texts)] == [2, 2, 4]  # the embedding, blocks, a norm and the head
    assert [len(chunk) for chunk in cut(recipe, 1, texts)] == [8]


@pytest.mark.parametrize(
    ("recipe", "number", "message"),
    [
        (Digits(), 2, r"add parts\(model\) to the recipe"),
        (Stack(), 3, r"gives 2 blocks, and 3 chunks .* one each: set parallel\.pipeline to fewer"),
        (Stack(select_blocks=lambda found: [nn.Tanh(), found[2]]), 2, r"must be among .*, in the same order"),
        (Stack(select_blocks=lambda found: [found[2], found[1]]), 2, r"must be among .*, in the same order"),
        (Stack(select_parts=lambda found: [*found, found[0]]), 2, r"and each part there once"),
        (Stack(select_parts=lambda found: found[:-1]), 2, r"leaves 3\.weight out"),
        (Stack(tied=True), 2, r"0\.weight is in chunks \[0, 1\] .* \(no tied ones\)"),
        (Stack(select_parts=lambda found: [found[0], nn.Tanh(), *found[1:]]), 2, r"must be all that the model comp"),
        (Stack(of_model=lambda model, x: model(x) + model(x)), 2, r"loss\(\) calls its model twice"),
        (Stack(of_model=lambda model, x: model(x + 1)), 2, r"loss\(\) does not give its model inputs\(batch\)"),
        (Stack(of_model=lambda model, x: torch.rand(()) * model(x)), 2, r"draws random numbers before it calls"),
    ],
)  # fmt: skip
def test_what_a_pipeline_cannot_do_is_refused(recipe: Recipe, number: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        cut(recipe, number)


class Own(nn.Module):
    """A model of what a test gives: its parts, and how it computes them by itself."""

    def __init__(self, parts: Sequence[nn.Module], compute: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(parts)
        self.compute = compute

    def forward(self, x: Tensor) -> Any:
        return self.compute(self, x)


class Calling(nn.Module):
    """A part that computes what a test says."""

    def __init__(self, compute: Callable[[Any], Any], *modules: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleList(modules)
        self.compute = compute

    def forward(self, values: Any) -> Any:
        return self.compute(values)


class Seeing(nn.Module):
    def __init__(self, seen: Tensor) -> None:
        super().__init__()
        self.register_buffer("seen", seen)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.seen


def in_turn(model: Any, x: Any) -> Any:
    for layer in model.layers:
        x = layer(x)
    return x


def noise(x: Tensor) -> Tensor:
    return x * float(np.random.standard_normal())


def narrow() -> nn.Linear:
    return nn.Linear(5, 3)


def frozen(layer: nn.Module) -> nn.Module:
    return layer.requires_grad_(False)


@dataclass(frozen=True, kw_only=True)
class Odd(Tiny):
    """Its parts are its model's layers, and its blocks all but the first; so it is cut before the second."""

    make: Callable[[], Own]
    more_parts: Callable[[Any], Sequence[nn.Module]] = lambda model: []

    def model(self) -> nn.Module:
        return self.make()

    def parts(self, model: Any) -> Sequence[nn.Module]:
        return [*model.layers, *self.more_parts(model)]

    def blocks(self, model: Any) -> Sequence[nn.Module]:
        return list(model.layers)


def grown(model: Any, x: Tensor) -> Tensor:
    x = model.layers[0](x)
    return cast(Tensor, model.layers[1](x * 0.5 + x.detach() * 0.5))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Own([nn.Linear(5, 5), narrow()], grown), UserError, r"give layers\.0\.weight another gradient than"),
        (
            lambda: Own([nn.Linear(5, 5), nn.Sequential(nn.ReLU(inplace=True), narrow())], in_turn),
            DeterministicError,
            r"of what those before gave, unchanged.*in-place operation",
        ),
        (lambda: Own([nn.Linear(5, 5), frozen(narrow())], in_turn), None, ""),
    ],
)  # fmt: skip
def test_what_is_computed_backward_counts_too(make: Callable[[], Own], error: Any, message: str) -> None:
    """All of these give the loss of the model. What is frozen at the end is nothing else."""
    recipe = Odd(make=make)
    if error is None:
        cut(recipe)
        return
    with pytest.raises(error, match=message):
        cut(recipe)


def test_a_tensor_that_is_given_twice_is_refused() -> None:
    x = torch.ones(2, requires_grad=True)
    assert len(as_tuple((x, x.view(2)))) == 2
    with pytest.raises(UserError, match="gives the same tensor twice"):
        as_tuple((x, x))


def test_random_numbers_of_the_backward_pass_are_refused() -> None:
    def make() -> Own:
        inner = nn.Linear(5, 5)
        drawing = Calling(lambda x: checkpoint(lambda y: inner(noise(y)), x, use_reentrant=False), inner)
        return Own([drawing, narrow()], in_turn)

    with pytest.raises(UserError, match="draws random numbers in its backward pass"):
        cut(Odd(make=make))


def test_a_buffer_that_a_part_holds_for_the_model_is_refused() -> None:
    def make() -> Own:
        model = Own([nn.Linear(5, 5), narrow()], lambda model, x: in_turn(model, x) * model.seen)
        model.register_buffer("seen", torch.ones(3))
        return model

    recipe = Odd(make=make, more_parts=lambda model: [Seeing(model.seen)])
    with pytest.raises(UserError, match=r"hold buffer seen elsewhere than the model does"):
        cut(recipe)


def test_what_is_left_after_a_loss_must_fit_too() -> None:
    """Six blocks, of which the third and the fourth share weights: in three chunks together, in two not."""

    def make() -> Own:
        layers = [nn.Linear(5, 5) for _ in range(5)]
        layers[3].weight = layers[2].weight
        return Own([*layers, narrow()], in_turn)

    recipe = Odd(make=make)
    model = recipe.model()
    chunks_of(recipe, model, 3)
    with pytest.raises(UserError, match=r"is in chunks \[0, 1\] of the pipeline"):
        require_cut(recipe, model, ParallelConfig(pipeline=3, schedule="1f1b"), CPU)


def test_a_loss_that_reads_more_of_its_model_is_refused() -> None:
    with pytest.raises(DeterministicError, match=r"the last of its parts\(\) in the model's place.*AttributeError"):
        cut(Stack(of_model=lambda model, x: model(x) + model.get_submodule("0").get_parameter("weight").sum()))


def test_ties_within_a_chunk_are_none_of_a_pipelines_business() -> None:
    assert len(cut(Stack(tied=True), 1)) == 1


@pytest.mark.parametrize("layout", [Layout(pipeline=2, shard=2), Layout(shard=2, tensor=2)], ids=str)
def test_layouts_whose_ranks_have_shards_are_refused(layout: Layout) -> None:
    with pytest.raises(UserError, match=r"go with data, and with one another: set parallel\.shard to 1"):
        make_replica_groups(layout, 0, timeout=timedelta(seconds=1))


def test_what_does_not_fit_is_refused_before_anybody_waits() -> None:
    parallel = ParallelConfig(pipeline=2, schedule="interleaved")
    with pytest.raises(UserError, match=r"add parts\(model\) to the recipe"):
        require_cut(Digits(), Digits().model(), parallel, CPU)
    with pytest.raises(UserError, match=r"gives 2 blocks, and 4 chunks"):
        require_cut(Stack(), Stack().model(), parallel, CPU)
    with pytest.raises(UserError, match=r"parallel\.pipeline was tried on processors alone so far"):
        require_cut(Stack(), Stack().model(), parallel, torch.device("cuda"))
    require_cut(Stack(), Stack().model(), replace(parallel, schedule="1f1b"), CPU)


class Together(torch.optim.SGD):
    """Scales all gradients by the first one of any parameter."""

    def step(self, closure: Any = None) -> None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        scale = parameters[0].grad.view(-1)[0].clone()
        for parameter in parameters:
            parameter.grad.mul_(scale)
        super().step()


def test_an_optimizer_that_looks_at_several_parameters_is_refused() -> None:
    for good in (torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor):
        require_separable(good(nn.Linear(2, 2).parameters(), lr=0.1))
    with pytest.raises(UserError, match=r"treats each parameter by itself, and Together does not: use parallel\.pipe"):
        require_separable(Together(nn.Linear(2, 2).parameters(), lr=0.1))
    with pytest.raises(UserError, match=r"and LBFGS could not be tried for that"):
        require_separable(torch.optim.LBFGS(nn.Linear(2, 2).parameters()))


def draws() -> list[float]:
    return [torch.rand(()).item(), torch.randn(()).item(), np.random.standard_normal(), random.gauss(0, 1)]


def test_random_streams_go_on_where_they_stood() -> None:
    """Also between the two numbers that numpy and Python draw at once."""
    seed_streams(5, CPU)
    for _ in range(3):
        saved = streams_now(CPU)
        expected = [*draws(), *draws()]
        seed_streams(6, CPU)
        assert draws() != expected[:4]
        set_streams(saved, CPU)
        assert [*draws(), *draws()] == expected
        set_streams(saved, CPU)
        assert torch.equal(streams_now(CPU), saved)
        draws()


def test_microbatches_under_way_see_their_own_buffers() -> None:
    """Forward twice, then back twice: as each alone."""
    norm = nn.BatchNorm1d(5)
    first = norm.running_mean
    chunk = Chunk(nn.Sequential(norm, nn.Tanh()))
    found = []
    inputs = [torch.randn(4, 5, requires_grad=True) for _ in range(2)]
    for number, x in enumerate(inputs):
        chunk.forward(number, [x], lambda x=x: chunk.module(x))
        found.append(norm.running_mean)
    assert first is not None
    assert not first.any(), "that of the step is what it was"
    for number, x in enumerate(inputs):
        (gradient,) = chunk.backward(number, [torch.ones(4, 5)])
        assert norm.running_mean is found[number]
        alone = nn.BatchNorm1d(5)
        (expected,) = torch.autograd.grad(torch.tanh(alone(x)).sum(), [x])
        assert torch.equal(gradient, expected)
        assert norm.running_mean is not None
        assert alone.running_mean is not None
        assert torch.equal(norm.running_mean, alone.running_mean)


def test_what_is_not_used_or_cannot_be_sent_is_refused() -> None:
    chunk = Chunk(nn.Identity())
    pair = [torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)]
    chunk.forward(0, pair, lambda: pair[0] * 2)
    with pytest.raises(UserError, match="does not use what the part before gave"):
        chunk.backward(0, [torch.ones(3)])
    wrong: list[Any] = [[torch.ones(1)], (torch.ones(1),), (torch.ones(1), 2)]
    for values in wrong:
        with pytest.raises(UserError, match="it gives a tensor, or a tuple of two or more"):
            as_tuple(values)
