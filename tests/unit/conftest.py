"""Fixtures of the unit tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from training.memory.slots import Slots, create_slots
from training.s3.objectstore import Store, StoreLocation

_clients: dict[str | None, Store] = {}


@pytest.fixture
def store(store: Store) -> Store:
    """An empty corner, with the clients of the test before: to make new ones takes longer than most tests."""
    where = store.location
    whole = _clients.setdefault(where.endpoint, Store(StoreLocation(endpoint=where.endpoint, bucket=where.bucket)))
    store.__dict__.update(_clients=whole._clients)
    return store


@pytest.fixture(autouse=True)
def roomy_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """However full the disk of this machine is: a cache would leave its last tenth alone."""
    monkeypatch.setattr("training.data.cache.MIN_FREE_SHARE", 0.0)


@pytest.fixture(autouse=True)
def patient_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the store is: a checkpoint that is due waits for the one before, and is of the step that it should
    be of."""
    monkeypatch.setattr("training.checkpointing.PATIENCE_SECONDS", 240.0)


@pytest.fixture
def slots() -> Iterator[Slots]:
    descriptors = create_slots()
    yield Slots(descriptors)
    for fd in descriptors:
        os.close(fd)
