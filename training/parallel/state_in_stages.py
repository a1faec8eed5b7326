"""A state of which each stage of a pipeline has its own parameters, and all of it for whoever wants it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from inspect import signature

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from training.arithmetic.collectives import texts_of_all_ranks
from training.checkpoints.optimizer_state import load_entries, named_entries
from training.checkpoints.state import TrainState
from training.errors import UserError
from training.parallel.passing import Form
from training.parallel.pipeline import Pipeline

PROBE_SHAPES = ((8, 8), (8, 3))
"""Of two matrices."""
NUM_PROBE_STEPS = 3


def require_separable(optimizer: Optimizer) -> None:
    """Raises `UserError` if one of that kind does not treat each parameter by itself. Found out by trying."""
    complaint = (
        f"parallel.pipeline needs an optimizer that treats each parameter by itself, and {type(optimizer).__name__}"
    )
    try:
        together = _stepped(optimizer, [0, 1])
        apart = [*_stepped(optimizer, [0]), *_stepped(optimizer, [1])]
    except Exception as error:
        raise UserError(f"{complaint} could not be tried for that ({error}): use parallel.pipeline = 1") from error
    if not all(torch.equal(one, other) for one, other in zip(together, apart, strict=True)):
        raise UserError(f"{complaint} does not: use parallel.pipeline = 1")


def _stepped(like: Optimizer, numbers: Sequence[int]) -> list[Tensor]:
    """What some steps of one of the kind make of these parameters, which always get the same gradients."""
    taken = signature(type(like)).parameters  # AdamW has more defaults than it takes
    settings = {name: value for name, value in like.defaults.items() if name in taken}
    chance = {number: torch.Generator().manual_seed(number) for number in numbers}
    parameters = {n: nn.Parameter(torch.randn(PROBE_SHAPES[n], generator=chance[n])) for n in numbers}
    optimizer = type(like)(list(parameters.values()), **settings)
    for _ in range(NUM_PROBE_STEPS):
        for number, parameter in parameters.items():
            parameter.grad = torch.randn(parameter.shape, generator=chance[number])
        optimizer.step()
    return [parameter.detach() for parameter in parameters.values()]


class StateInStages:
    """Whole parameters, or parts of matrices, of this rank's stage, and what the optimizer keeps of these."""

    def __init__(self, state: TrainState, pipeline: Pipeline) -> None:
        """Frees what is other stages'."""
        self._state = state
        self._pipeline = pipeline
        parameters = dict(state.model.named_parameters())
        self._own = {name: p for name, p in parameters.items() if pipeline.stage_of[p] == pipeline.stage}
        self._others = {name: p for name, p in parameters.items() if name not in self._own}
        self._forget_others()

    def _forget_others(self) -> None:
        """Nothing here can reach them: they become empty."""
        optimizer = self._state.optimizer
        for parameter in self._others.values():
            parameter.data = parameter.data.new_empty(0)
            optimizer.state.pop(parameter, None)
        own = set(self._own.values())
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p in own]

    def whole_state(self) -> AbstractContextManager[None]:
        """Meanwhile it has all stages' weights, and what the optimizer keeps of them. Collective."""
        return self._having(named_entries(self._state.optimizer, self._own))

    def lent(self) -> AbstractContextManager[None]:
        """Meanwhile it has all stages' weights. Collective at its beginning."""
        return self._having({})

    @contextmanager
    def _having(self, entries: Mapping[str, Tensor]) -> Iterator[None]:
        """All stages' weights, and theirs of what this stage has as `entries`."""
        if self._pipeline.num_stages == 1:
            yield
            return
        own = {f"weight.{name}": p.detach() for name, p in self._own.items()}
        with self._pipeline.waiting():
            others = self._of_other_stages({**own, **entries})
        for name, parameter in self._others.items():
            parameter.data = others.pop(f"weight.{name}")
        load_entries(self._state.optimizer, self._others, others, may_keep=True)
        try:
            yield
        finally:
            self._forget_others()

    def _of_other_stages(self, own: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each stage tells first which ones it has."""
        forms = json.dumps({name: asdict(Form.of(tensor)) for name, tensor in own.items()})
        stages = self._pipeline.groups.stages
        texts = texts_of_all_ranks(forms)
        found = {}
        for stage, rank in enumerate(dist.get_process_group_ranks(stages)):
            for name, about in json.loads(texts[rank]).items():
                is_own = stage == self._pipeline.stage
                form = Form.told(about)
                tensor = own[name].contiguous() if is_own else form.room()
                dist.broadcast(tensor, group=stages, group_src=stage)
                if not is_own:
                    found[name] = form.placed(tensor)
        return found
