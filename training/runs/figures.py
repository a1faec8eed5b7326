"""What a rank counts as it trains, for whoever watches. The training thread adds, another one reads and sends."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass


@dataclass(kw_only=True)
class Figures:
    """Of one rank since its group began, in seconds, bytes and numbers; so a counter that falls began anew."""

    steps: int = 0
    samples: float = 0.0
    """That this rank computed itself."""
    loss: float = math.nan
    """Of the last finished step; NaN before the first."""
    outside_seconds: float = 0.0
    """In steps, but not waiting for other ranks."""
    pace_seconds: float = 0.0
    """The same, if all ranks had as many virtual workers: who takes most is slow, and not merely well trusted."""
    collective_seconds: float = 0.0
    """In steps, waiting for other ranks."""
    data_wait_seconds: float = 0.0
    """Waiting for microbatches."""
    checkpoint_seconds: float = 0.0
    """What checkpoints held the training up."""
    checkpoint_bytes: int = 0
    """Of this rank's parts."""
    checkpoint_step: int = 0
    """Of the last one that this rank had the record name; only rank 0 does."""
    checkpoint_time: float = 0.0
    """Of that, in seconds since 1970; 0: none in this group."""
    losses_not_finite: int = 0

    def numbers(self) -> dict[str, float]:
        """Those that JSON can hold."""
        return {name: value for name, value in asdict(self).items() if math.isfinite(value)}
