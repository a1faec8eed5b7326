"""The safetensors format, as far as files are written and views of them taken here: https://github.com/huggingface/safetensors#format"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from training.documents import canonical_json, read_document
from training.errors import DamagedError

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
_NAMES = {known: name for name, known in DTYPES.items()}
_LENGTH_BYTES = 8
MAX_ELEMENTS = 1 << 60


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
    """What it says, in the order of the bytes. Raises `DamagedError` if it says what cannot be."""
    entries = read_document(bytes(head[_LENGTH_BYTES:]), what="a file of tensors")
    entries.pop("__metadata__", None)
    try:
        places = [(name, _place(entry, len(head))) for name, entry in entries.items()]
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"a file of tensors is damaged: its head says {error}") from error
    return dict(sorted(places, key=lambda item: (item[1].start, item[1].stop)))


def _place(entry: Any, num_head_bytes: int) -> Place:
    """Raises `KeyError`, `TypeError` and `ValueError`."""
    import torch

    dtype: torch.dtype = getattr(torch, _NAMES[entry["dtype"]])
    shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
        raise ValueError(f"{entry}")
    if math.prod(max(length, 1) for length in shape) > MAX_ELEMENTS:  # torch counts so, be there a 0 among them
        raise ValueError(f"{shape}")
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{stop - start} bytes for {shape}")
    return Place(dtype=dtype, shape=shape, start=num_head_bytes + start, stop=num_head_bytes + stop)


def tensors(file: memoryview) -> dict[str, Tensor]:
    """Views of a file's tensors, nothing copied. Raises `DamagedError` if they are not there."""
    places = layout(head(lambda start, stop: file[start:stop]))
    if any(place.stop > len(file) for place in places.values()):
        raise DamagedError("a file of tensors is damaged: it is shorter than its head says")
    return {name: _view(file[place.start : place.stop], place) for name, place in places.items()}


def _view(data: memoryview, place: Place) -> Tensor:
    import torch

    flat = torch.frombuffer(data, dtype=torch.uint8) if len(data) else torch.empty(0, dtype=torch.uint8)
    return flat.view(place.dtype).view(place.shape)
