"""The safetensors format, as far as files are written and views of them taken here: https://github.com/huggingface/safetensors#format"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from training.documents import canonical_json

if TYPE_CHECKING:
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


def header(tensors: Iterable[tuple[str, str, Sequence[int], int]], **entries: Any) -> bytes:
    """What comes before the bytes of tensors (name, dtype, shape, number of bytes): padded to a multiple of 8."""
    offset = 0
    for name, dtype, shape, num_bytes in tensors:
        end = offset + num_bytes
        entries[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = canonical_json(entries)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def tensors(file: memoryview) -> dict[str, Tensor]:
    """Views of a file's tensors, nothing copied. For bytes that are known to be whole: nothing is checked."""
    import torch

    start = 8 + int.from_bytes(file[:8], "little")
    dtypes = {known: getattr(torch, name) for name, known in DTYPES.items()}
    found = {}
    for name, entry in json.loads(bytes(file[8:start])).items():
        if name != "__metadata__":
            first, end = (start + offset for offset in entry["data_offsets"])
            flat = (
                torch.frombuffer(file[first:end], dtype=torch.uint8)
                if end > first
                else torch.empty(0, dtype=torch.uint8)
            )
            found[name] = flat.view(dtypes[entry["dtype"]]).view(entry["shape"])
    return found
