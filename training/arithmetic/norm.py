"""Norms over fixed blocks: the same bits whoever has which part of a parameter, as long as no block is cut."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 16


def blocks(num_elements: int) -> list[range]:
    """Those of a flattened tensor; the last one may be shorter."""
    starts = range(0, num_elements, BLOCK_ELEMENTS)
    return [range(start, min(start + BLOCK_ELEMENTS, num_elements)) for start in starts]


def block_norms(tensors: Iterable[Tensor]) -> Tensor:
    """The Euclidean norm of each block of each tensor, shape [blocks], in their order."""
    return torch.stack(
        torch._foreach_norm([block for t in tensors for block in torch.split(t.reshape(-1), BLOCK_ELEMENTS)])
    )


def norm_of(norms: Tensor) -> float:
    """Of all blocks together."""
    return float(torch.linalg.vector_norm(norms))


def clip_factor(norm: float, limit: float | None) -> float | None:
    """What gradients of that norm are to be multiplied with; None if they may stay."""
    return limit / norm if limit is not None and norm > limit else None
