"""What is summed over virtual workers beside gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from training.arithmetic.buffers import Buffers
from training.data import ledger

LOW = 1 << 12
"""Words are float32 sums, exact for whole numbers below 2^24: a step number travels in two."""


@dataclass(frozen=True, kw_only=True)
class Control:
    """What ranks decide together, once per step."""

    regroup: bool = False
    """End this group after this step."""
    checkpoint_and_regroup: bool = False
    checkpoint: bool = False
    """Rank 0 alone says so."""
    committed_step: int = 0
    """Of the newest checkpoint that rank 0 knows to be named by the record."""

    def words(self) -> list[float]:
        """One rank's part. They are summed over all."""
        high, low = divmod(self.committed_step, LOW)
        return [float(word) for word in (self.regroup, self.checkpoint_and_regroup, self.checkpoint, high, low)]

    @staticmethod
    def decided(words: list[float]) -> Control:
        regroup, checkpoint_and_regroup, checkpoint, high, low = (round(word) for word in words)
        return Control(
            regroup=regroup > 0,
            checkpoint_and_regroup=checkpoint_and_regroup > 0,
            checkpoint=checkpoint > 0,
            committed_step=high * LOW + low,
        )


NUM_CONTROL_WORDS = len(Control().words())


class Extras:
    """Changes of float buffers, the loss, words (those of `Control` first), counters, and entries of the ledger, as one
    vector."""

    def __init__(self, model: nn.Module, *, num_words: int = NUM_CONTROL_WORDS, with_counters: bool = False) -> None:
        """`with_counters`: some ranks have no virtual worker, and hear from others what became of the buffers that are
        no floats: a byte of these is a number here."""
        self._num_words = num_words
        self._buffers = Buffers(model)
        self.num_changes = self._buffers.num_float_elements
        """The first numbers: of float buffers."""
        self._num_counters = len(self._buffers.counters()) if with_counters else 0
        self.num_elements = self.num_changes + 1 + num_words + self._num_counters + ledger.NUM_ENTRIES
        self._before: list[Tensor] | None = None

    def hold(self) -> None:
        """The buffers as they are now are those of the last finished step, whatever is done with them from here on."""
        self._before = self._buffers.copy()

    def release(self) -> None:
        """The buffers as they are now are so again."""
        self._before = None

    def take_back(self) -> None:
        """Whatever has been done with them since: the step will not be finished."""
        if self._before is not None:
            self._buffers.put_back(self._before)
            self._before = None

    def settled(self) -> dict[str, Tensor]:
        """Those of the last finished step, by name, as far as they may differ from what they are now."""
        return {} if self._before is None else self._buffers.by_name(self._before)

    def begin_worker(self) -> None:
        """Each virtual worker starts from the step's own buffers; counters so advance once per step."""
        assert self._before is not None
        self._buffers.put_back(self._before)

    def gather(
        self, loss: Tensor, words: Sequence[float], entries: NDArray[np.float32], tells_counters: bool = False
    ) -> Tensor:
        """One virtual worker's, shape [num_elements]. Without words it says 0 in their places. One in all
        `tells_counters`."""
        assert self._before is not None
        changes = self._buffers.changes(self._before)
        said = np.zeros(self._num_words + self._num_counters, np.float32)
        said[: len(words)] = words
        if tells_counters and self._num_counters:
            said[self._num_words :] = self._buffers.counters()
        rest = torch.from_numpy(np.concatenate([said, entries]))
        return torch.cat([*changes, loss.reshape(1), rest.to(loss.device)])

    def said(self, words: Sequence[float]) -> Tensor:
        """What a rank has to say that has no virtual worker, shape [num_elements]."""
        found = torch.zeros(self.num_elements)
        start = self.num_changes + 1
        found[start : start + len(words)] = torch.tensor(words)
        return found

    def hand_out(self, mean: Tensor) -> float:
        """Put the new buffers where they belong; returns the mean loss."""
        assert self._before is not None
        self._buffers.add_mean(self._before, mean[: self.num_changes])
        return float(mean[self.num_changes])

    def take_counters(self, total: Tensor) -> None:
        """From the sum over all virtual workers: the buffers that are no floats become what they are elsewhere."""
        if self._num_counters:
            end = len(total) - ledger.NUM_ENTRIES
            self._buffers.set_counters(total[end - self._num_counters : end].to(torch.uint8).numpy())

    def control(self, total: Tensor) -> Control:
        """From the sum over all virtual workers."""
        return Control.decided(self._words(total)[:NUM_CONTROL_WORDS])

    def other_words(self, total: Tensor) -> list[float]:
        """From the sum over all virtual workers."""
        return self._words(total)[NUM_CONTROL_WORDS:]

    def _words(self, total: Tensor) -> list[float]:
        start = self.num_changes + 1
        words: list[float] = total[start : start + self._num_words].tolist()
        return words

    def ledger_line(self, total: Tensor) -> str:
        """From the sum over all virtual workers."""
        return ledger.seal(total[-ledger.NUM_ENTRIES :].cpu().numpy())
