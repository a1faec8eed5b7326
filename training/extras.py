"""What is summed over virtual workers beside gradients."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from training.data import ledger


class Extras:
    """Float buffers, the loss, and entries of the ledger, as one vector."""

    def __init__(self, model: nn.Module) -> None:
        self._buffers = [b for b in model.buffers() if b.is_floating_point()]
        self._counters = [b for b in model.buffers() if not b.is_floating_point()]
        self.num_elements = sum(b.numel() for b in self._buffers) + 1 + ledger.NUM_ENTRIES

    def copy_buffers(self) -> list[Tensor]:
        return [b.clone() for b in (*self._buffers, *self._counters)]

    def restore_buffers(self, copies: list[Tensor]) -> None:
        """Each virtual worker starts from the step's own buffers; counters so advance once per step."""
        for buffer, copy in zip((*self._buffers, *self._counters), copies, strict=True):
            buffer.copy_(copy)

    def gather(self, loss: Tensor, entries: NDArray[np.float32]) -> Tensor:
        """One virtual worker's, shape [num_elements]."""
        buffers = [b.flatten().to(torch.float32) for b in self._buffers]
        return torch.cat([*buffers, loss.reshape(1), torch.from_numpy(entries).to(loss.device)])

    def hand_out(self, mean: Tensor) -> float:
        """Put the mean buffers where they belong; returns the mean loss."""
        offset = 0
        for buffer in self._buffers:
            buffer.copy_(mean[offset : offset + buffer.numel()].view_as(buffer))
            offset += buffer.numel()
        return float(mean[offset])

    def ledger_line(self, total: Tensor) -> str:
        """From the sum over all virtual workers."""
        return ledger.seal(total[-ledger.NUM_ENTRIES :].cpu().numpy())
