"""How a safetensors file begins: https://github.com/huggingface/safetensors#format"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from training.documents import canonical_json

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
