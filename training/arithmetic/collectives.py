"""What all ranks have to say, heard by each. It lies in the host's memory, and travels by gloo on GPUs too."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def of_all_ranks(own: Tensor) -> Tensor:
    """Every rank's vector of [n] numbers, as [ranks, n]; without a group, this one's. Collective."""
    if not dist.is_initialized():
        return own.unsqueeze(0)
    found = torch.empty(dist.get_world_size() * len(own), dtype=own.dtype, device=own.device)
    dist.all_gather_single(found, own)
    return found.view(-1, len(own))


def texts_of_all_ranks(own: str) -> list[str]:
    """Every rank's, in their order. Collective."""
    data = torch.frombuffer(bytearray(own.encode()), dtype=torch.uint8)
    sizes: list[int] = of_all_ranks(torch.tensor([len(data)])).flatten().tolist()
    padded = torch.zeros(max(sizes), dtype=torch.uint8)
    padded[: len(data)] = data
    found = of_all_ranks(padded)
    return [bytes(row[:size].tolist()).decode() for row, size in zip(found, sizes, strict=True)]


def is_of_lost_peer(error: BaseException) -> bool:
    """Whether an error of a collective says only that another rank is gone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection" in str(error)
