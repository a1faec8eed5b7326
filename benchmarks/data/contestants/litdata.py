"""LitData: `optimize` with two workers, `StreamingDataset` and its own loader."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.data.records import BATCH_SIZE, KINDS, Kind


def _options() -> dict[str, str]:
    from litdata.streaming import downloader

    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # else it speaks to no server without TLS
    return {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]}


def write(kind: Kind, url: str, cache: Path) -> None:
    from functools import partial

    from litdata import optimize

    optimize(
        fn=partial(_sample, kind.name),
        inputs=list(range(kind.num_samples)),
        output_dir=url,
        chunk_bytes="8MB",
        num_workers=2,
        storage_options=_options(),
        verbose=False,
    )


def _sample(kind_name: str, index: int) -> dict[str, Any]:
    _options()  # in the worker's process
    return KINDS[kind_name].sample(index)


def read(kind: Kind, url: str, cache: Path, *, shuffled: bool) -> Iterator[tuple[Any, Any]]:
    from litdata import StreamingDataLoader, StreamingDataset

    dataset = StreamingDataset(url, cache_dir=str(cache), shuffle=shuffled, storage_options=_options())
    for batch in StreamingDataLoader(dataset, batch_size=BATCH_SIZE, num_workers=0):
        yield batch["x"].numpy(), batch["y"].numpy()
