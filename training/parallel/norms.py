"""The norm of gradients of which each rank of a group has some, and clipping by it: the bits of one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor

from training.arithmetic.norm import block_norms, clip_factor, norm_of


def clip_together(
    gradients: list[Tensor],
    block_places: Sequence[Tensor],
    *,
    group: dist.ProcessGroup,
    clip_norm: float | None,
    waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> float:
    """Scale this rank's gradients; returns the norm before, of all ranks'. It is taken block by block, in the order of
    all parameters: `block_places` says where each rank's blocks stand there; those that several have are the same.
    Collective, and `waiting` while it is."""
    most = max(len(places) for places in block_places)
    mine = torch.zeros(most)
    if gradients:
        norms = block_norms(gradients)
        mine[: len(norms)] = norms
    found = torch.empty(len(block_places) * most)
    with waiting():
        dist.all_gather_single(found, mine, group=group)
    ordered = torch.empty(int(torch.cat(list(block_places)).max()) + 1)
    for places, norms in zip(block_places, torch.split(found, most), strict=True):
        ordered[places] = norms[: len(places)]
    norm = norm_of(ordered)
    factor = clip_factor(norm, clip_norm)
    if factor is not None and gradients:
        torch._foreach_mul_(gradients, factor)
    return norm
