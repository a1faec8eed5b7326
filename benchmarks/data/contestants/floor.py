"""The physical floor: the bytes of this library's shards, moved by the fastest client, and nothing proven or promised.

Reading: keep-alive GETs in two threads ahead of the decoder, whole shards in order (or in a random order, each shuffled
within). Writing: the samples are made, as by a user's code, and the raw bytes PUT as they are, in objects of a shard's
size, by two threads.
"""

from __future__ import annotations

import http.client
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import numpy as np

from benchmarks.data.contestants import s3
from benchmarks.data.contestants.protocol import BATCH_SIZE, SEED, Task, serve
from benchmarks.data.records import Batch, columns, rebatch, samples, source_files
from training.data.shard import decode_shard

NUM_THREADS = 2
NUM_AHEAD = 4
OBJECT_BYTES = 8 << 20


def write(task: Task) -> Callable[[], None]:
    client = s3.client()
    paths = source_files(task.source)
    num_together = max(1, OBJECT_BYTES // paths[0].stat().st_size)

    def put(start: int) -> None:
        files = [path.read_bytes() for path in paths[start : start + num_together]]
        for data in files:
            deque(samples(columns(np.frombuffer(data, dtype=task.kind.dtype))), maxlen=0)
        body = b"".join(files)
        client.put_object(Bucket=task.bucket, Key=f"{start:05d}", Body=body)

    def work() -> None:
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            list(pool.map(put, range(0, len(paths), num_together)))

    return work


def read(task: Task, rank: int) -> Callable[[], Iterable[Batch]]:
    random = np.random.default_rng(SEED)
    names = s3.keys(task.bucket, containing="/shards/")
    if task.shuffled:
        random.shuffle(names)
    urls = s3.signed_urls(task.bucket, names[rank :: task.num_processes])

    def tables() -> Iterator[Batch]:
        for data in _ahead(urls):
            shard = decode_shard(data, name="")
            order = random.permutation(len(shard)) if task.shuffled else slice(None)
            yield {name: column[order] for name, column in shard.columns.items()}  # type: ignore[index]

    return lambda: rebatch(tables(), BATCH_SIZE)


def _ahead(urls: list[str]) -> Iterator[bytes]:
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        coming = [pool.submit(_get, url) for url in urls[:NUM_AHEAD]]
        for number in range(len(urls)):
            if number + NUM_AHEAD < len(urls):
                coming.append(pool.submit(_get, urls[number + NUM_AHEAD]))
            yield coming.pop(0).result()


_local = threading.local()


def _get(url: str) -> bytes:
    parts = urlsplit(url)
    if not hasattr(_local, "connection"):
        _local.connection = http.client.HTTPConnection(parts.netloc)
    _local.connection.request("GET", f"{parts.path}?{parts.query}")
    data: bytes = _local.connection.getresponse().read()
    return data


if __name__ == "__main__":
    serve(write, read)
