"""A rank's share of the state as the bytes of a safetensors file, in a buffer that is used again.

The training thread waits for this copy and for nothing else; to copy into pages that were touched before is several
times quicker than into fresh ones. Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from training import tensorfile
from training.errors import UserError


class Snapshot:
    """Takes one copy after another. Each is valid until the next is taken."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def take(self, tensors: Mapping[str, Tensor]) -> bytearray:
        """The file's bytes. The same tensors give the same bytes, whatever their layout in memory.

        Raises `UserError` naming a tensor whose dtype the format lacks.
        """
        names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # so each is aligned
        header = _header(tensors, names)
        start = len(header)
        size = start + sum(tensors[name].nbytes for name in names)
        if len(self._buffer) != size:
            self._buffer = bytearray(size)
        self._buffer[:start] = header
        for name in names:
            self._put(tensors[name].detach(), start)
            start += tensors[name].nbytes
        return self._buffer

    def _put(self, tensor: Tensor, start: int) -> None:
        if tensor.is_cpu and tensor.is_contiguous():  # memcpy, 1.4 times as quick as torch's copy_
            memoryview(self._buffer)[start : start + tensor.nbytes] = tensor.reshape(-1).view(torch.uint8).numpy().data
        elif tensor.numel():
            place = torch.frombuffer(self._buffer, dtype=tensor.dtype, count=tensor.numel(), offset=start)
            place.view(tensor.shape).copy_(tensor)


def _header(tensors: Mapping[str, Tensor], names: list[str]) -> bytes:
    dtypes = {name: str(tensors[name].dtype).removeprefix("torch.") for name in names}
    for name in names:
        if dtypes[name] not in tensorfile.DTYPES:
            raise UserError(f"{name} has dtype {tensors[name].dtype}, which a checkpoint cannot hold")
    return tensorfile.header((name, dtypes[name], tensors[name].shape, tensors[name].nbytes) for name in names)
