"""The safetensors format, as far as files are written and views of them taken here: https://github.com/huggingface/safetensors#format"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from training.documents import canonical_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DTYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
}
"""The format's names, by those that numpy and torch share."""
_LENGTH_BYTES = 8


def header(tensors: Iterable[tuple[str, str, Sequence[int], int]], **entries: Any) -> bytes:
    """What comes before the bytes of tensors (name, dtype, shape, number of bytes): padded to a multiple of 8."""
    offset = 0
    for name, dtype, shape, num_bytes in tensors:
        end = offset + num_bytes
        entries[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = canonical_json(entries)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


@dataclass(frozen=True, kw_only=True)
class Place:
    """Of a tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Of its bytes in the file, and their end."""
    stop: int


Layout = Mapping[str, Place]


def head(read: Callable[[int, int], memoryview]) -> memoryview:
    """What comes before the bytes of tensors. `read` gives the bytes [start, stop) of the file."""
    return read(0, _LENGTH_BYTES + int.from_bytes(read(0, _LENGTH_BYTES), "little"))


def layout(head: memoryview) -> Layout:
    """What it says, in the order of the bytes. As everything read here, it is known to be whole: nothing is checked."""
    import torch

    dtypes = {known: getattr(torch, name) for name, known in DTYPES.items()}
    entries = json.loads(bytes(head[_LENGTH_BYTES:]))
    entries.pop("__metadata__", None)
    return {
        name: Place(
            dtype=dtypes[entry["dtype"]],
            shape=tuple(entry["shape"]),
            start=len(head) + entry["data_offsets"][0],
            stop=len(head) + entry["data_offsets"][1],
        )
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"])
    }


def tensors(file: memoryview) -> dict[str, Tensor]:
    """Views of a file's tensors, nothing copied."""
    places = layout(head(lambda start, stop: file[start:stop]))
    return {name: _view(file[place.start : place.stop], place) for name, place in places.items()}


def _view(data: memoryview, place: Place) -> Tensor:
    import torch

    flat = torch.frombuffer(data, dtype=torch.uint8) if len(data) else torch.empty(0, dtype=torch.uint8)
    return flat.view(place.dtype).view(place.shape)
