"""WebDataset: tar shards uploaded when they are full, read as streams, shuffled through its buffer."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.data.records import BATCH_SIZE, SHARD_BYTES, Kind

SHUFFLE_BUFFER = 1000


def _client() -> Any:
    import boto3

    return boto3.client("s3")


def write(kind: Kind, url: str, cache: Path) -> None:
    import webdataset

    client = _client()
    bucket, _, prefix = url.removeprefix("s3://").partition("/")

    def upload(path: str) -> None:
        client.upload_file(path, bucket, f"{prefix}/{os.path.basename(path)}")
        os.unlink(path)

    cache.mkdir(parents=True, exist_ok=True)
    with webdataset.ShardWriter(
        f"{cache}/%06d.tar", maxsize=SHARD_BYTES, maxcount=10**9, post=upload, verbose=0
    ) as writer:
        for index in range(kind.num_samples):
            sample = kind.sample(index)
            writer.write({"__key__": f"{index:09}", "x.npy": sample["x"], "y.cls": int(sample["y"])})


def read(kind: Kind, url: str, cache: Path, *, shuffled: bool) -> Iterator[tuple[Any, Any]]:
    import webdataset

    client = _client()
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    gopen = importlib.import_module("webdataset.gopen")  # the package has a function of the same name
    gopen.gopen_schemes["s3"] = lambda url, *_, **__: client.get_object(Bucket=bucket, Key=url.split("/", 3)[3])["Body"]
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix + "/")
    urls = sorted(f"s3://{bucket}/{item['Key']}" for page in pages for item in page["Contents"])
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dataset = webdataset.WebDataset(
        urls[rank::world_size], shardshuffle=len(urls) if shuffled else False, nodesplitter=None
    )
    if shuffled:
        dataset = dataset.shuffle(SHUFFLE_BUFFER)
    yield from dataset.decode().to_tuple("x.npy", "y.cls").batched(BATCH_SIZE)
