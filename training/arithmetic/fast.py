"""Fast mode: plain DistributedDataParallel with the same order of data. No promise on bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from training.arithmetic.sparse import have_whole_gradients
from training.errors import UserError


class FastReducer:
    """Mean gradients over all virtual workers, summed as the backend likes. Used like `ExactReducer`."""

    def __init__(self, objective: nn.Module, *, ranges: Sequence[range], rank: int) -> None:
        world_size = len(ranges)
        have_whole_gradients(objective)
        self.owned = ranges[rank]
        self._parameters = [p for p in objective.parameters() if p.requires_grad]
        self._objective = objective
        if world_size > 1:  # buffers are averaged with the extras, and the gradients may stay where they were summed
            self._objective = DistributedDataParallel(objective, broadcast_buffers=False, gradient_as_bucket_view=True)
        self._scale = world_size / ranges[-1].stop  # DDP takes the mean over ranks
        self._is_alone = world_size == 1
        self._extras: Tensor | None = None
        self._maybe_summing: dist.Work | None = None

    def forward(self, worker: int, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss of one virtual worker's microbatch."""
        if worker == self.owned.start:
            self._extras = None
            for parameter in self._parameters:
                parameter.grad = None
        if isinstance(self._objective, DistributedDataParallel):  # as its no_sync() does
            self._objective.require_backward_grad_sync = worker == self.owned.stop - 1
        try:
            loss: Tensor = self._objective(batch)
        except RuntimeError as error:
            if "find_unused_parameters" in str(error):
                raise UserError(
                    "train.mode = 'fast' needs a loss that reaches every parameter in each step, and this one did not:"
                    " freeze those that it does not reach, or use train.mode = 'exact'"
                ) from error
            raise
        return loss

    def backward(self, worker: int, loss: Tensor, extras: Tensor) -> None:
        """Its gradients, added to those before. The extras are on their way meanwhile."""
        self._extras = extras if self._extras is None else self._extras.add_(extras)
        if worker == self.owned.stop - 1 and not self._is_alone:
            self._maybe_summing = dist.all_reduce(self._extras, async_op=True)
        (loss * self._scale).backward()  # type: ignore[no-untyped-call]  # torch has no annotation here

    def finish(self) -> Tensor:
        """The mean gradients are in their places; returns the sum of all extras."""
        assert self._extras is not None
        if self._maybe_summing is not None:
            self._maybe_summing.wait()
        return self._extras

    def close(self) -> None:
        """DistributedDataParallel lets no parameter go: the process ends instead."""
