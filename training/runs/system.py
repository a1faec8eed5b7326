"""What each node's machine is doing: samples on the store, which a follower forwards.

runs/KEY/GENERATION/system/NODE-INCARNATION/N.jsonl: one writer per stream (an agent), chunks without a gap.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import psutil

from training.documents import END_OF_TIME, canonical_json, parse, read_document
from training.errors import DamagedError, MissingError, UnbrokenError
from training.s3.objectstore import Store

SAMPLE_SECONDS = 10.0
MEBI = 2**20
_STREAM = re.compile(r"(\d{1,9})-", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One look at a machine; network traffic since its boot."""

    time: float
    cpu_utilization_percentage: float
    system_memory_usage_megabytes: float
    system_memory_usage_percentage: float
    network_receive_megabytes: float
    network_transmit_megabytes: float


def take_sample() -> Sample:
    memory, network = psutil.virtual_memory(), psutil.net_io_counters()
    return Sample(
        time=time.time(),
        cpu_utilization_percentage=psutil.cpu_percent(),
        system_memory_usage_megabytes=memory.used / MEBI,
        system_memory_usage_percentage=memory.percent,
        network_receive_megabytes=network.bytes_recv / MEBI,
        network_transmit_megabytes=network.bytes_sent / MEBI,
    )


class SampleWriter:
    """Sends samples, each with those that could not be sent before."""

    def __init__(self, store: Store, prefix: str, *, node: int, incarnation: str) -> None:
        self._store = store
        self._prefix = f"{_folder(prefix)}{node}-{incarnation}/"
        self._waiting: list[bytes] = []
        self._next_chunk = 0

    def send(self, sample: Sample) -> None:
        """A store that is away only delays it."""
        self._waiting.append(canonical_json(asdict(sample)) + b"\n")
        try:
            self._store.put(f"{self._prefix}{self._next_chunk:06d}.jsonl", b"".join(self._waiting))
        except UnbrokenError:  # the next one takes it along
            return
        self._next_chunk += 1
        self._waiting = []


async def keep_sampling(writer: SampleWriter, sample: Callable[[], Sample] = take_sample) -> None:
    """Until it is cancelled."""
    while True:
        await asyncio.to_thread(lambda: writer.send(sample()))
        await asyncio.sleep(SAMPLE_SECONDS)


class SampleReader:
    """Reads all nodes' samples as they appear."""

    def __init__(self, store: Store, prefix: str) -> None:
        self._store = store
        self._folder = _folder(prefix)
        self._chunks: dict[str, int] = {}

    def read_new(self) -> Iterator[tuple[int, Sample]]:
        """(node, sample), in order for each incarnation of a node."""
        for stream in self._store.list_folders(self._folder):
            if match := _STREAM.match(stream):
                self._chunks.setdefault(stream, 0)
                yield from ((int(match[1]), sample) for sample in self._read(stream))

    def _read(self, stream: str) -> Iterator[Sample]:
        while True:
            key = f"{self._folder}{stream}/{self._chunks[stream]:06d}.jsonl"
            try:
                data = self._store.get(key)
            except MissingError:
                return
            self._chunks[stream] += 1
            uri = self._store.location.uri(key)
            yield from (_sample(line, uri) for line in data.splitlines())


def _sample(line: bytes, uri: str) -> Sample:
    try:
        found = parse(Sample, read_document(line, what=uri))
    except DamagedError as error:
        raise DamagedError(f"{uri} is damaged: {error}") from error
    if not 0 <= found.time < END_OF_TIME:
        raise DamagedError(f"{uri} is damaged: it holds no sample of a machine")
    return found


def _folder(prefix: str) -> str:
    return f"{prefix}system/"
