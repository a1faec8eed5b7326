"""What stages send one another: tensors, with their form when it is another one than before. No pickle.

A received tensor has the strides that it had where it was made, as kernels may give other bits for others.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

NOTHING = -1
"""In the place of the length of what is told of forms."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """All of a tensor but its elements, as JSON can say it."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    wants_gradient: bool

    @classmethod
    def of(cls, tensor: Tensor) -> Form:
        return cls(
            shape=tuple(tensor.shape),
            strides=tensor.stride(),
            dtype=str(tensor.dtype).removeprefix("torch."),
            wants_gradient=tensor.requires_grad,
        )

    @classmethod
    def told(cls, about: Mapping[str, Any]) -> Form:
        return cls(**{**about, "shape": tuple(about["shape"]), "strides": tuple(about["strides"])})

    def room(self) -> Tensor:
        """For its elements, one after another."""
        return torch.empty(self.shape, dtype=getattr(torch, self.dtype))

    def placed(self, elements: Tensor) -> Tensor:
        """The tensor, of elements that came one after another."""
        if elements.stride() != self.strides:
            tensor = torch.empty_strided(self.shape, self.strides, dtype=elements.dtype)
            once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in self.strides)
            tensor[once] = elements[once]  # an expanded dimension is one row of memory
            elements = tensor
        return elements.requires_grad_(self.wants_gradient)


class Passing:
    """Between the ranks of a pipeline. Messages of one tag between two ranks come in the order in which they went."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._forms: dict[int, list[Form]] = {}
        self._sending: deque[Future[None]] = deque()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="sending")
        """A thread that waits for what is sent, as gloo tells nobody else, and then lets its memory go."""

    def send(self, tag: int, maybe_tensors: Sequence[Tensor] | None, *, stage: int) -> None:
        """Does not wait. None: there is nothing to send, of what failed."""
        if maybe_tensors is None:
            self._send(torch.tensor([NOTHING]), tag, stage)
            return
        forms = [Form.of(tensor) for tensor in maybe_tensors]
        about = b"" if forms == self._forms.get(tag) else json.dumps([asdict(form) for form in forms]).encode()
        self._forms[tag] = forms
        self._send(torch.tensor([len(about)]), tag, stage)
        if about:
            self._send(torch.frombuffer(bytearray(about), dtype=torch.uint8), tag, stage)
        for tensor in maybe_tensors:
            self._send(tensor.detach().contiguous(), tag, stage)

    def receive(self, tag: int, *, stage: int) -> list[Tensor] | None:
        """Waits for them. None: there is nothing."""
        size = int(self._receive(torch.empty(1, dtype=torch.int64), tag, stage))
        if size == NOTHING:
            return None
        if size:
            about = self._receive(torch.empty(size, dtype=torch.uint8), tag, stage).numpy().tobytes()
            self._forms[tag] = [Form.told(one) for one in json.loads(about)]
        return [form.placed(self._receive(form.room(), tag, stage)) for form in self._forms[tag]]

    def wait(self) -> None:
        """Until all are where they were sent to."""
        while self._sending:
            self._sending.popleft().result()

    def close(self) -> None:
        """Nothing is sent any more."""
        self._pool.shutdown(wait=False)

    def _send(self, tensor: Tensor, tag: int, stage: int) -> None:
        while self._sending and self._sending[0].done():
            self._sending.popleft().result()
        if tensor.numel():
            work = dist.isend(tensor, group=self._group, group_dst=stage, tag=tag)
            assert work is not None
            self._sending.append(self._pool.submit(_until_sent, work, tensor))

    def _receive(self, tensor: Tensor, tag: int, stage: int) -> Tensor:
        if tensor.numel():
            dist.recv(tensor, group=self._group, group_src=stage, tag=tag)
        return tensor


def _until_sent(work: dist.Work, tensor: Tensor) -> None:
    """Its memory is needed until then."""
    work.wait()
