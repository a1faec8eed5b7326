"""A follower's sign of life on the store: whoever finds it unchanged for long knows that nobody follows the run."""

from __future__ import annotations

import time
import uuid

from training.documents import canonical_json
from training.errors import MissingError
from training.runs.record import Record, generation_prefix
from training.s3.objectstore import Store

BEAT_SECONDS = 5.0


class Pulse:
    """One follower's. Several may follow one run: any change of the object is a sign of life."""

    def __init__(self, store: Store, record: Record) -> None:
        self._store = store
        self._key = _key(record)
        self._follower = uuid.uuid4().hex
        self._count = 0
        self._next = 0.0

    def beat(self) -> None:
        """Give a sign of life, if it is time for one. Raises `InfrastructureError` if the store is away."""
        now = time.monotonic()
        if now >= self._next:
            self._store.put(self._key, canonical_json({"follower": self._follower, "count": self._count}))
            self._count += 1
            self._next = now + BEAT_SECONDS


def last_sign(store: Store, record: Record) -> bytes:
    """The newest sign of life of any follower; empty if there never was one."""
    try:
        return store.get(_key(record))
    except MissingError:
        return b""


def _key(record: Record) -> str:
    return f"{generation_prefix(record.key, record.generation)}follower.json"
