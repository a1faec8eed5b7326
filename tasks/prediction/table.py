"""One shard's predictions as a Parquet file."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from training.data.exchange import to_arrow

if TYPE_CHECKING:
    from numpy.typing import NDArray

ID, PREDICTION = "id", "prediction"
ABOUT = b"unbroken"


def to_parquet(ids: Sequence[str], outputs: NDArray[Any], about: dict[str, Any]) -> bytes:
    """One row per sample: its id, and what the model gave: a number, or a flat list whose shape is in the metadata.
    The same samples and outputs give the same bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    shape = list(outputs.shape[1:])
    table = pa.table({ID: pa.array(list(ids), pa.string()), PREDICTION: to_arrow(outputs)})
    told = json.dumps({**about, "shape": shape}, sort_keys=True).encode()
    out = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({ABOUT: told}), out, compression="zstd", write_page_checksum=True)
    return out.getvalue()
