"""Shards by number: fetched once, verified on arrival, kept within bounds in memory, then in files without a name."""

from __future__ import annotations

import errno
import io
import mmap
import os
import resource
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from training.data.manifest import ShardInfo, shard_key
from training.data.shard import Shard, decode_shard
from training.documents import fast_digest, sha256_hex
from training.errors import DamagedError, MissingError
from training.s3.objectstore import Store
from training.signatures import keyring

NUM_THREADS = 4
MEMORY_BYTES = 1 << 30
MAX_FILES = 1 << 16
MIN_FREE_SHARE = 0.1
REPAIR = "Start the pipeline again: its shard stage then repairs it from the source"
Fetch = Callable[[ShardInfo], bytes | memoryview]


def fetch_from(store: Store, dataset: str) -> Fetch:
    """How a dataset's shards are got from the store."""
    return lambda info: store.fetch(shard_key(dataset, info.sha256))


class ShardCache:
    """Shards of one split. Safe to use from many threads; a shard that several want is fetched once.

    What does not fit into `memory_bytes` goes to unnamed files (at most `disk_bytes`, and never the last tenth of the
    disk), which the kernel removes with this process, however that ends. A copy from there is verified again.

    Raises `DamagedError` naming the shard if its bytes are wrong twice in a row, or if it is missing.
    """

    def __init__(
        self, fetch: Fetch, shards: Sequence[ShardInfo], *, memory_bytes: int = MEMORY_BYTES, disk_bytes: int = 0
    ) -> None:
        self._fetch = fetch
        self._shards = shards
        self._memory_bytes = memory_bytes
        self._disk = _Disk(disk_bytes)
        self._lock = threading.Lock()
        self._resident: OrderedDict[int, tuple[Shard, bytes | memoryview]] = OrderedDict()
        self._resident_bytes = 0
        self._loading: dict[int, Future[Shard]] = {}
        self._pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="shards")
        self.num_bytes_fetched = 0

    def get(self, number: int) -> Shard:
        """The shard; waits for it if need be."""
        with self._lock:
            if number in self._resident:
                self._resident.move_to_end(number)
                return self._resident[number][0]
            loading = self._start(number)
        return loading.result()

    def prefetch(self, numbers: Iterable[int]) -> None:
        """Begin to load shards that will be wanted soon, the most urgent first, as many as fit into memory together.

        More of them would only push one another out. What goes wrong is told to whoever gets the shard.
        """
        num_bytes = 0
        with self._lock:
            for number in numbers:
                num_bytes += self._shards[number].num_bytes
                if num_bytes > self._memory_bytes:
                    return
                if number in self._resident:
                    self._resident.move_to_end(number)
                else:
                    self._start(number)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._disk.close()

    def _start(self, number: int) -> Future[Shard]:
        if number not in self._loading:
            self._loading[number] = self._pool.submit(self._load, number)
        return self._loading[number]

    def _load(self, number: int) -> Shard:
        try:
            info = self._shards[number]
            data = self._copy_on_disk(number) or self._fetched(info)
            shard = decode_shard(data, name=info.sha256)
            with self._lock:
                self._keep(number, shard, data)
            return shard
        finally:
            with self._lock:
                del self._loading[number]

    def _copy_on_disk(self, number: int) -> memoryview | None:
        with self._lock:
            copy = self._disk.get(number)
        if copy is None or _is_whole(copy, self._shards[number]):
            return copy
        with self._lock:
            self._disk.drop(number)
        return None

    def _fetched(self, info: ShardInfo) -> bytes | memoryview:
        """Twice if need be: the first copy may have been damaged on its way."""
        try:
            for _ in range(2):
                data = self._fetch(info)
                with self._lock:
                    self.num_bytes_fetched += len(data)
                if _is_whole(data, info) and _is_trusted(data, info):
                    return data
        except MissingError as error:
            raise DamagedError(f"shard {info.sha256} is missing: {error}. {REPAIR}") from error
        raise DamagedError(f"shard {info.sha256} is damaged on the store. {REPAIR}")

    def _keep(self, number: int, shard: Shard, data: bytes | memoryview) -> None:
        self._resident[number] = (shard, data)
        self._resident_bytes += len(data)
        while self._resident_bytes > self._memory_bytes and len(self._resident) > 1:
            oldest, (_, old) = self._resident.popitem(last=False)
            self._resident_bytes -= len(old)
            self._disk.put(oldest, old)


def _is_whole(data: bytes | memoryview, info: ShardInfo) -> bool:
    return len(data) == info.num_bytes and fast_digest(data) == info.xxh3


def _is_trusted(data: bytes | memoryview, info: ShardInfo) -> bool:
    """xxh3 finds what happens to bytes, and not what somebody does to them: who has keys looks for that too."""
    return keyring() is None or sha256_hex(data) == info.sha256


class _Disk:
    """Byte strings in files without a name, oldest out first. Whoever calls holds the cache's lock."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._max_files = _allow_many_files() // 2 if max_bytes else 0
        self._files: OrderedDict[int, io.FileIO] = OrderedDict()
        self._num_bytes = 0

    def put(self, number: int, data: bytes | memoryview) -> None:
        """Keep a copy, if there is room: it is fetched again if not."""
        if number in self._files or len(data) > self._max_bytes or not self._max_files:
            return
        while self._num_bytes + len(data) > self._max_bytes or len(self._files) >= self._max_files:
            self.drop(next(iter(self._files)))
        try:
            file = _unnamed_file()
        except OSError:  # no folder for it, or too many files are open
            return
        try:
            _require_room(file, len(data))
            _write_all(file, data)
        except OSError:  # the disk is full, or nearly
            file.close()
            return
        self._files[number] = file
        self._num_bytes += len(data)

    def get(self, number: int) -> memoryview | None:
        if number not in self._files:
            return None
        return memoryview(mmap.mmap(self._files[number].fileno(), 0, prot=mmap.PROT_READ))

    def drop(self, number: int) -> None:
        file = self._files.pop(number)
        self._num_bytes -= os.fstat(file.fileno()).st_size
        file.close()

    def close(self) -> None:
        for number in list(self._files):
            self.drop(number)


def _allow_many_files() -> int:
    """Raise this process's limit as far as it may itself; returns the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return MAX_FILES if soft == resource.RLIM_INFINITY else soft


def _require_room(file: io.FileIO, num_bytes: int) -> None:
    disk = os.fstatvfs(file.fileno())
    if disk.f_bavail * disk.f_frsize - num_bytes < MIN_FREE_SHARE * disk.f_blocks * disk.f_frsize:
        raise OSError(errno.ENOSPC, "the last tenth of the disk is left to others")


def _unnamed_file() -> io.FileIO:
    """Without a name from its first moment, where the file system can (O_TMPFILE)."""
    return tempfile.TemporaryFile(buffering=0)


def _write_all(file: io.FileIO, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
