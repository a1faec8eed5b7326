"""Recipes that do what recipes do in the wild, by name, and some that cannot be trained exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adafactor, AdamW, Optimizer
from torch.utils.checkpoint import checkpoint

from tests.unit.tiny import NUM_INPUTS, Tiny, TinyModel

Forward = Callable[["OddModel", Tensor], Tensor]


class OddModel(TinyModel):
    """The tiny model with buffers of all sorts, and a `forward` that may do more with them."""

    def __init__(self, forward: Forward | None = None) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(NUM_INPUTS))
        self.register_buffer("passing", torch.zeros(NUM_INPUTS), persistent=False)
        self.register_buffer("mask", torch.full((3,), torch.finfo(torch.float32).min))
        self.register_buffer("blocked", torch.full((3,), -torch.inf))
        self.register_buffer("pi", torch.tensor(torch.pi, dtype=torch.float64))
        self.register_buffer("third", torch.rand(20) / 3)
        self._odd_forward = forward

    def forward(self, x: Tensor) -> Tensor:
        if self._odd_forward is not None:
            x = self._odd_forward(self, x)
        return super().forward(x)


def replaces_a_buffer(model: OddModel, x: Tensor) -> Tensor:
    model.mean = 0.9 * model.mean + 0.1 * x.mean(0)
    return x - model.mean


def changes_a_passing_buffer(model: OddModel, x: Tensor) -> Tensor:
    model.passing.add_(x.mean(0))
    return x - model.passing


def changes_buffers_when_judged(model: OddModel, x: Tensor) -> Tensor:
    model.mean.add_(0.25)
    return x + model.mean


def makes_a_buffer(model: OddModel, x: Tensor) -> Tensor:
    if not hasattr(model, "late"):
        model.register_buffer("late", torch.zeros(1))
    return x


def grows_a_buffer(model: OddModel, x: Tensor) -> Tensor:
    model.mean = torch.cat([model.mean, x.mean(0)])
    return x


def unfreezes(model: OddModel, x: Tensor) -> Tensor:
    model.norm.weight.requires_grad_(True)
    return x


def frozen_norm() -> nn.Module:
    model = OddModel()
    model.norm.eval()
    return model


def frozen_at_first() -> nn.Module:
    model = OddModel(unfreezes)
    model.norm.weight.requires_grad_(False)
    return model


def complex_buffer() -> nn.Module:
    model = OddModel()
    model.register_buffer("waves", torch.zeros(2, dtype=torch.complex64))
    return model


class Reentrant(TinyModel):
    """Uses one parameter in two blocks that are computed again in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        def block(inputs: Tensor) -> Tensor:
            return inputs * self.weight[0]

        for _ in range(2):
            x = checkpoint(block, x.requires_grad_(True), use_reentrant=True)  # type: ignore[no-untyped-call]
        return super().forward(x)


class Sparse(TinyModel):
    """Looks something up, and not in an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(4, NUM_INPUTS))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + F.embedding(torch.zeros(len(x), dtype=torch.int64), self.table, sparse=True))


class CountingSGD(SGD):
    """Keeps numbers where others keep tensors: for each parameter, and among its settings."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            for parameter in group["params"]:
                state = self.state[parameter]
                state["count"] = state.get("count", 0) + 1
                parameter.grad.div_(state["count"] + group["k"])
        return super().step(closure)


class ListingSGD(SGD):
    """Keeps what no checkpoint holds."""

    def step(self, closure: Any = None) -> Any:
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["history"] = [1, 2]
        return super().step(closure)


MODELS: Mapping[str, Callable[[], nn.Module]] = {
    "": OddModel,
    "replaces a buffer": lambda: OddModel(replaces_a_buffer),
    "changes a passing buffer": lambda: OddModel(changes_a_passing_buffer),
    "changes buffers when judged": lambda: OddModel(changes_buffers_when_judged),
    "frozen norm": frozen_norm,
    "makes a buffer": lambda: OddModel(makes_a_buffer),
    "grows a buffer": lambda: OddModel(grows_a_buffer),
    "unfreezes": frozen_at_first,
    "complex buffer": complex_buffer,
    "reentrant": Reentrant,
    "sparse": Sparse,
}
OPTIMIZERS: Mapping[str, Callable[[Any], Optimizer]] = {
    "": lambda model: AdamW(model.parameters(), lr=0.05),
    "head only": lambda model: AdamW([model.weight], lr=0.05),
    "adafactor": lambda model: Adafactor(model.parameters(), lr=0.05),
    "counting": lambda model: CountingSGD(model.parameters(), lr=0.05),
    "momentum in one group": lambda model: SGD(
        [{"params": [model.weight], "momentum": 0.9}, {"params": list(model.norm.parameters())}], lr=0.05
    ),
    "tensor rate": lambda model: AdamW(model.parameters(), lr=torch.tensor(0.05), foreach=False),
    "listing": lambda model: ListingSGD(model.parameters(), lr=0.05),
    "needs a closure": lambda model: torch.optim.LBFGS(model.parameters()),
    "none": lambda model: None,  # type: ignore[dict-item,return-value]
}


@dataclass(frozen=True, kw_only=True)
class Odd(Tiny):
    """The tiny recipe with one oddity of each kind."""

    model_kind: str = ""
    optimizer_kind: str = ""
    loss_kind: str = ""
    scale_kind: str = ""
    scores_kind: str = ""

    def model(self) -> nn.Module:
        return MODELS[self.model_kind]()

    def optimizer(self, model: nn.Module) -> Optimizer:
        return OPTIMIZERS[self.optimizer_kind](model)

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        loss: Any = super().loss(model, batch)
        kinds = {"detached": loss.detach(), "vector": loss.expand(2), "number": float(loss.detach()), "none": None}
        return kinds[self.loss_kind] if self.loss_kind else loss

    def learning_rate_scale(self, step: int, num_steps: int) -> float:
        kinds: dict[str, Any] = {"nan": float("nan"), "negative": -1, "none": None}
        return kinds[self.scale_kind] if self.scale_kind else 1.0

    def scores(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        scores = super().scores(model, batch)
        if self.scores_kind == "fails":
            raise KeyError("oops")
        return {"loss": scores["loss"] * float("nan")} if self.scores_kind == "nan" else scores
