"""The shard format: one safetensors file (columns of samples), written by us so that its bytes never change.

Readable without this project by any safetensors library: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from training.documents import canonical_json
from training.errors import DamagedError

FORMAT = 1
ID_BYTES = "id.bytes"
ID_ENDS = "id.ends"
Columns = Mapping[str, "np.ndarray[Any, Any]"]

_NAMES = {
    "uint8": "U8",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    "bool": "BOOL",
}
_DTYPES = {name: np.dtype(dtype) for dtype, name in _NAMES.items()}


def dtype_is_known(dtype: np.dtype[Any]) -> bool:
    """Whether a sample's field may have this dtype."""
    return dtype.name in _NAMES


def encode_shard(ids: Sequence[str], fields: Columns) -> bytes:
    """Pack columns (each of shape [samples, …]) and the samples' ids. The same input gives the same bytes."""
    encoded_ids = [text.encode() for text in ids]
    columns = {
        **fields,
        ID_BYTES: np.frombuffer(b"".join(encoded_ids), dtype=np.uint8),
        ID_ENDS: np.cumsum([len(text) for text in encoded_ids], dtype=np.int64),
    }
    header: dict[str, Any] = {"__metadata__": {"format": f"unbroken-shard-{FORMAT}"}}
    bodies: list[bytes] = []
    offset = 0
    for name in sorted(columns):
        column = np.ascontiguousarray(columns[name])
        body = column.astype(column.dtype.newbyteorder("<"), copy=False).tobytes()
        header[name] = {
            "dtype": _NAMES[column.dtype.name],
            "shape": list(column.shape),
            "data_offsets": [offset, offset + len(body)],
        }
        bodies.append(body)
        offset += len(body)
    text = canonical_json(header)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(bodies)


def decode_shard(data: bytes, *, name: str) -> tuple[list[str], Columns]:
    """The inverse of `encode_shard`. Raises `DamagedError` naming the shard."""
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        if header.pop("__metadata__")["format"] != f"unbroken-shard-{FORMAT}":
            raise DamagedError(f"shard {name} has another format than {FORMAT}: it needs another release")
        columns = {key: _column(data, 8 + length, entry) for key, entry in header.items()}
        ends = columns.pop(ID_ENDS).tolist()
        text = columns.pop(ID_BYTES).tobytes()
        ids = [text[start:end].decode() for start, end in zip([0, *ends], ends, strict=False)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"shard {name} is damaged: {error}") from error
    return ids, columns


def _column(data: bytes, base: int, entry: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    start, end = entry["data_offsets"]
    flat = np.frombuffer(memoryview(data)[base + start : base + end], dtype=_DTYPES[entry["dtype"]])
    return flat.reshape(entry["shape"])
