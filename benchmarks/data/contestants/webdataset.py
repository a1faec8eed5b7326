"""WebDataset: tar shards made by `ShardWriter` and sent by its `post` hook, read through its curl pipe.

As its documentation recommends: `split_by_node`, and batching inside the pipeline. Shuffling is of shards, and then
of samples in a buffer of 1000.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import webdataset as wds

from benchmarks.data.contestants import s3
from benchmarks.data.contestants.protocol import BATCH_SIZE, SEED, Task, serve, stack
from benchmarks.data.records import Batch, read_file, samples, source_files

BUFFER = 1000


def write(task: Task) -> Callable[[], None]:
    client = s3.client()

    def send(path: str) -> None:
        client.upload_file(path, task.bucket, Path(path).name)
        os.unlink(path)

    def work() -> None:
        pattern = str(Path(task.scratch) / "%05d.tar")
        with wds.ShardWriter(pattern, maxsize=task.chunk_bytes, post=send, verbose=0) as sink:
            for path in source_files(task.source):
                for sample in samples(read_file(path, task.kind)):
                    sink.write(_encoded(sample, task.kind.payload))

    return work


def _encoded(sample: dict[str, Any], payload: str) -> dict[str, Any]:
    label = {"label.cls": int(sample["label"])} if "label" in sample else {}
    return {"__key__": f"{sample['id']:09d}", f"{payload}.npy": sample[payload], **label}


def read(task: Task, rank: int) -> Callable[[], Iterable[Batch]]:
    urls = s3.signed_urls(task.bucket, s3.keys(task.bucket))
    payload = task.kind.payload

    def decoded(sample: dict[str, Any]) -> dict[str, Any]:
        label = {"label": sample["label.cls"]} if "label.cls" in sample else {}
        return {"id": int(sample["__key__"]), payload: sample[f"{payload}.npy"], **label}

    def together(rows: list[dict[str, Any]]) -> Batch:
        return stack([decoded(row) for row in rows])

    def work() -> Iterable[Batch]:
        shards = len(urls) if task.shuffled else False
        data = wds.WebDataset(urls, shardshuffle=shards, nodesplitter=wds.split_by_node, seed=SEED, empty_check=False)
        if task.shuffled:
            data = data.shuffle(BUFFER, seed=SEED)
        found: Iterable[Batch] = data.decode().batched(BATCH_SIZE, collation_fn=together)
        return found

    return work


if __name__ == "__main__":
    serve(write, read)
