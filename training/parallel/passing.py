"""What stages send one another: tensors of a form that is told once, and then taken for granted. No pickle.

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

from training.errors import UserError


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

    def send(self, tag: int, tensors: Sequence[Tensor], *, stage: int) -> None:
        """Does not wait. Raises `UserError` if they are of another form than the first ones of the tag."""
        forms = [Form.of(tensor) for tensor in tensors]
        if tag not in self._forms:
            self._forms[tag] = forms
            self._tell(json.dumps([asdict(form) for form in forms]), tag, stage)
        if self._forms[tag] != forms:
            raise UserError(
                f"a part of the recipe's model gives {forms}, and gave {self._forms[tag]} of the microbatch before: a"
                " pipeline needs the same of each"
            )
        for tensor in tensors:
            self._send(tensor.detach().contiguous(), tag, stage)

    def receive(self, tag: int, *, stage: int) -> list[Tensor]:
        """Waits for them."""
        if tag not in self._forms:
            self._forms[tag] = [Form.told(about) for about in json.loads(self._hear(tag, stage))]
        return [form.placed(self._receive(form.room(), tag, stage)) for form in self._forms[tag]]

    def wait(self) -> None:
        """Until all are where they were sent to."""
        while self._sending:
            self._sending.popleft().result()

    def close(self) -> None:
        """Nothing is sent any more."""
        self._pool.shutdown(wait=False)

    def _tell(self, text: str, tag: int, stage: int) -> None:
        data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        self._send(torch.tensor([data.numel()]), tag, stage)
        self._send(data, tag, stage)

    def _hear(self, tag: int, stage: int) -> str:
        size = self._receive(torch.empty(1, dtype=torch.int64), tag, stage)
        data = self._receive(torch.empty(int(size), dtype=torch.uint8), tag, stage)
        return data.numpy().tobytes().decode()

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
