"""A recipe whose model is cut into stages, and fails in one of them on one sample if it is to. Imported by the
zygote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.distributed.in_blocks import POISON, POISONED
from tests.distributed.pipelining import Layer, Narrow, Noisy, Widen

__all__ = ["POISON", "InParts"]
MARK = 3
_failures: list[int] = []
"""In this process."""


class Marking(Widen):
    """What later parts scale by shows the sample."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        grown, scale = super().forward(x)
        return grown, torch.where((x == POISONED).all(dim=1), MARK, scale)


class Trap(nn.Module):
    """Fails `forward` or `backward`; or `once`, and then no more."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def forward(self, values: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, scale = values
        if self.training and bool((scale == MARK).any()):
            if self.way == "forward":
                raise ValueError("what is this?")
            if self.way == "once" and not _failures:
                _failures.append(POISON)
                raise ValueError("by chance")
            if self.way == "backward":
                x.register_hook(_fail)  # type: ignore[no-untyped-call]  # no annotation
        return x, scale


@dataclass(frozen=True, kw_only=True)
class InParts(Noisy):
    """`fails` says after which layer, and how: "0 forward", "3 backward", …; or "loss"."""

    fails: str = ""

    def model(self) -> nn.Module:
        place, _, way = self.fails.partition(" ")
        traps = [Trap(way if place == str(number) else "") for number in range(self.num_layers)]
        return nn.Sequential(Marking(), *(part for trap in traps for part in (Layer(), trap)), Narrow())

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        return [part for part in self.parts(model) if isinstance(part, Layer)]

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        loss = super().loss(model, batch)
        is_poisoned = bool((batch["x"] == POISONED).all(dim=1).any())
        return loss * torch.nan if self.fails == "loss" and is_poisoned else loss


def _fail(gradient: Tensor) -> Tensor:
    raise ValueError("whither?")
