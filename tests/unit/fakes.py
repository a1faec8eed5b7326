"""Stand-ins with the real interface: a rendezvous in one process, and stores that fail where a test says so."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

from training.documents import canonical_json
from training.errors import InfrastructureError, MissingError
from training.s3.objectstore import Buffer, Store, StoreLocation, Versioned


class DictRendezvous:
    """What a checkpoint saver uses of torch's store: `set`, `get` and `wait`."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()

    def set(self, key: str, value: str) -> None:
        with self._changed:
            self._values[key] = value.encode()
            self._changed.notify_all()

    def get(self, key: str) -> bytes:
        with self._changed:
            return self._values[key]

    def wait(self, keys: Sequence[str], timeout: timedelta) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: set(keys) <= set(self._values), timeout.total_seconds()):
                raise RuntimeError(f"timed out waiting for {', '.join(keys)}")


class FaultyStore(Store):
    """The real store, but for PUTs that `fault` makes fail: before they are applied, or after (a lost reply)."""

    def __init__(self, store: Store, fault: Callable[[str], bool], *, apply_first: bool = False) -> None:
        self.__dict__.update(store.__dict__)
        self._fault = fault
        self._apply_first = apply_first
        self.num_faults = 0

    def put(self, key: str, data: bytes | bytearray) -> None:
        fails = self._fault(key)
        if not fails or self._apply_first:
            super().put(key, data)
        if fails:
            self.num_faults += 1
            raise InfrastructureError(f"{key}: the test says that the store is away")

    def _put_quickly(self, key: str, pieces: Sequence[Buffer], **_: Any) -> None:
        self.put(key, b"".join(pieces))


class CountingStore(Store):
    """The real store, with a list of the keys that were fetched."""

    def __init__(self, store: Store) -> None:
        self.__dict__.update(store.__dict__)
        self.fetched: list[str] = []

    def get(self, key: str) -> bytes:
        self.fetched.append(key)
        return super().get(key)

    def fetch(self, key: str) -> bytes:
        self.fetched.append(key)
        return super().fetch(key)


class MemoryStore(Store):
    """Objects in a dictionary, for tests of thousands of stores. One writer at a time."""

    def __init__(self, objects: Mapping[str, bytes]) -> None:
        super().__init__(StoreLocation(endpoint=None, bucket="memory"))
        self.objects = dict(objects)

    def get(self, key: str) -> bytes:
        if key not in self.objects:
            raise MissingError(f"{key} does not exist")
        return self.objects[key]

    def put(self, key: str, data: bytes | bytearray) -> None:
        self.objects[key] = bytes(data)

    def list_folders(self, prefix: str) -> list[str]:
        inside = (key.removeprefix(prefix) for key in self.objects if key.startswith(prefix))
        return sorted({name for name, slash, _ in (key.partition("/") for key in inside) if slash})

    def read_versioned(self, key: str) -> Versioned:
        return Versioned(document=json.loads(self.get(key)), etag="")

    def create_versioned(self, key: str, document: dict[str, Any]) -> bool:
        if key in self.objects:
            return False
        self.objects[key] = canonical_json(document)
        return True

    def replace_versioned(self, key: str, document: dict[str, Any], *, read: Versioned) -> bool:
        self.objects[key] = canonical_json(document)
        return True
