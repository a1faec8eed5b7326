"""A recipe whose model is cut between two ranks, in a block and outside of it, and fails on one sample if it is to.
Imported by the zygote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.servers.wide import Wide, WideModel
from tests.unit.tiny import tiny_reader

POISON = 11
"""The number of that sample."""
_failures: list[int] = []
"""In this process."""
POISONED = torch.from_numpy(tiny_reader().read([POISON])[1]["x"])


@dataclass(frozen=True, kw_only=True)
class InBlocks(Wide):
    """`fails` says how, and where: "loss", "forward", "backward"; or "once", and then no more."""

    fails: str = ""

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        assert isinstance(model, WideModel)
        return (model.norm,)

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        is_poisoned = bool((batch["x"] == POISONED).all(dim=1).any())
        if self.fails == "forward" and is_poisoned:
            raise ValueError("what is this?")
        if self.fails == "once" and is_poisoned and not _failures:
            _failures.append(POISON)
            raise ValueError("by chance")
        loss = super().loss(model, batch)
        if self.fails == "backward" and is_poisoned:
            loss.register_hook(_fail)  # type: ignore[no-untyped-call]  # no annotation
        return loss * torch.nan if self.fails == "loss" and is_poisoned else loss


def _fail(gradient: Tensor) -> Tensor:
    raise ValueError("whither?")
