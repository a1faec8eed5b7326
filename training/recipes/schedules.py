"""Learning-rate schedules of the built-in recipes, relative to the peak."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["cosine", "constant"]


def warmup_then(schedule: Schedule, step: int, num_steps: int, *, warmup_steps: int) -> float:
    """Up in a straight line, then down to 0 at the end (`cosine`) or level (`constant`).

    A level one does not depend on the number of steps, so a finished run can go on with more.
    """
    warmup = min(1.0, (step + 1) / warmup_steps)
    return warmup if schedule == "constant" else warmup * 0.5 * (1 + math.cos(math.pi * step / num_steps))
