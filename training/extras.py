"""What is summed over virtual workers beside gradients."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from training.buffers import Buffers
from training.data import ledger


class Extras:
    """Changes of float buffers, the loss, and entries of the ledger, as one vector."""

    def __init__(self, model: nn.Module) -> None:
        self._buffers = Buffers(model)
        self._num_changes = self._buffers.num_float_elements
        self.num_elements = self._num_changes + 1 + ledger.NUM_ENTRIES

    def begin_step(self) -> None:
        self._before = self._buffers.copy()

    def begin_worker(self) -> None:
        """Each virtual worker starts from the step's own buffers; counters so advance once per step."""
        self._buffers.put_back(self._before)

    def gather(self, loss: Tensor, entries: NDArray[np.float32]) -> Tensor:
        """One virtual worker's, shape [num_elements]."""
        changes = self._buffers.changes(self._before)
        return torch.cat([*changes, loss.reshape(1), torch.from_numpy(entries).to(loss.device)])

    def hand_out(self, mean: Tensor) -> float:
        """Put the new buffers where they belong; returns the mean loss."""
        self._buffers.add_mean(self._before, mean[: self._num_changes])
        return float(mean[self._num_changes])

    def ledger_line(self, total: Tensor) -> str:
        """From the sum over all virtual workers."""
        return ledger.seal(total[-ledger.NUM_ENTRIES :].cpu().numpy())
