"""A batch through its program: each request gets its own rows back, or why there are none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tasks.serving.batching import Request


@dataclass(frozen=True, kw_only=True)
class Computed:
    """What came of a request: `outputs`, unless there is a `failure` to tell."""

    request: Request
    outputs: np.ndarray[Any, Any]
    batch_rows: int
    failure: str = ""


NOTHING = np.empty(0)


def compute(batch: Sequence[Request]) -> list[Computed]:
    """What fails for one request fails for that one alone: its neighbours are computed without it."""
    program = batch[0].program
    inputs = batch[0].inputs if len(batch) == 1 else np.concatenate([request.inputs for request in batch])
    try:
        outputs = program.run(inputs)
    except Exception as error:  # a model may raise whatever it likes
        if len(batch) > 1:
            return [computed for request in batch for computed in compute([request])]
        first_line = next(iter(str(error).splitlines()), "")
        why = f"version {program.version} raised {type(error).__name__}: {first_line}"
        return [Computed(request=batch[0], outputs=NOTHING, batch_rows=len(inputs), failure=why)]
    starts = np.cumsum([0, *(request.num_rows for request in batch)])
    return [
        _checked(request, outputs[start : start + request.num_rows], len(inputs))
        for request, start in zip(batch, starts, strict=False)
    ]


def _checked(request: Request, outputs: np.ndarray[Any, Any], batch_rows: int) -> Computed:
    """JSON has no number that is not finite."""
    failure = ""
    if outputs.dtype.kind == "f" and not np.isfinite(outputs).all():
        row = int(np.argwhere(~np.isfinite(outputs))[0][0])
        failure = f"version {request.program.version} gave no finite number for row {row}"
    return Computed(request=request, outputs=outputs, batch_rows=batch_rows, failure=failure)
