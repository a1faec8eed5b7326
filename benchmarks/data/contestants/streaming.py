"""MosaicML Streaming: MDS with its defaults, and torch's loader."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.data.records import BATCH_SIZE, SHARD_BYTES, Kind


def write(kind: Kind, url: str, cache: Path) -> None:
    from streaming import MDSWriter

    shape = ",".join(map(str, kind.shape))
    columns = {"x": f"ndarray:{kind.dtype}:{shape}", "y": "int"}
    with MDSWriter(out=url, columns=columns, size_limit=SHARD_BYTES) as writer:
        for index in range(kind.num_samples):
            sample = kind.sample(index)
            writer.write({"x": sample["x"], "y": int(sample["y"])})


def read(kind: Kind, url: str, cache: Path, *, shuffled: bool) -> Iterator[tuple[Any, Any]]:
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    dataset = StreamingDataset(remote=url, local=str(cache), shuffle=shuffled, batch_size=BATCH_SIZE)
    for batch in DataLoader(dataset, batch_size=BATCH_SIZE, num_workers=0):
        yield batch["x"].numpy(), batch["y"].numpy()
