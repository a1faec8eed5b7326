"""Who works on a dataset: any number of writers, or one collector of garbage, never both.

One conditional document per dataset holds them with the time at which each lapses, so that the dead block
nobody for long (docs/protocols.md, "Collecting garbage").
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from training.errors import InfrastructureError, UserError
from training.objectstore import Store

FORMAT = 1
LEASE_SECONDS = 600.0
MARGIN = 0.1
"""Share of a lease that the clocks of two machines may be apart, and that a request may take to be applied."""


def activity_key(dataset: str) -> str:
    return f"datasets/{dataset}/activity.json"


class Lease:
    """A claim on a dataset, renewed in the background while it is held."""

    def __init__(self, store: Store, dataset: str, kind: str, *, seconds: float) -> None:
        self._store = store
        self._dataset = dataset
        self._kind = kind
        self._id = uuid.uuid4().hex
        self._seconds = seconds
        self._sure_until = 0.0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._renew_for_ever, name="lease", daemon=True)

    def enter(self) -> None:
        """Raises `UserError` if the other kind is at work."""
        self._claim(self._entered)
        self._thread.start()

    def leave(self) -> None:
        self._stopped.set()
        self._thread.join()
        self._change(self._without_me)

    @property
    def is_sure(self) -> bool:
        """Whether a request that is sent now is applied while the claim holds, whatever other machines' clocks say."""
        return time.monotonic() < self._sure_until - MARGIN * self._seconds

    def require_sure(self) -> None:
        """Raises `InfrastructureError` if the claim may have lapsed (this process was stopped, or the store away)."""
        if not self.is_sure:
            raise InfrastructureError(
                f"dataset {self._dataset!r}: this process was away for so long that others may have begun to clean up;"
                " run it again: what is finished is found"
            )

    def renew(self) -> None:
        """Raises `InfrastructureError` if the claim has lapsed and was taken away."""
        self._claim(self._renewed)

    def _claim(self, change: Callable[[dict[str, float]], dict[str, float]]) -> None:
        asked = time.monotonic()
        self._change(change)
        self._sure_until = asked + self._seconds

    def _renew_for_ever(self) -> None:
        while not self._stopped.wait(self._seconds / 4):
            try:
                self.renew()
            except InfrastructureError:  # `require_sure` tells, should it last
                continue

    def _entered(self, holders: dict[str, float]) -> dict[str, float]:
        others = [name for name in holders if not name.startswith(self._kind) or self._kind == "collector"]
        if others:
            who = "a writer is" if others[0].startswith("writer") else "garbage is being collected"
            raise UserError(
                f"dataset {self._dataset!r}: {who} at work; try again when it is done"
                f" (if it died, in {max(holders[name] for name in others) - time.time():.0f} s)"
            )
        return self._with_me(holders)

    def _renewed(self, holders: dict[str, float]) -> dict[str, float]:
        if self._name not in holders:
            raise InfrastructureError(f"dataset {self._dataset!r}: this process's claim has lapsed: run it again")
        return self._with_me(holders)

    def _with_me(self, holders: dict[str, float]) -> dict[str, float]:
        return {**holders, self._name: time.time() + (1 + MARGIN) * self._seconds}

    def _without_me(self, holders: dict[str, float]) -> dict[str, float]:
        return {name: lapses for name, lapses in holders.items() if name != self._name}

    @property
    def _name(self) -> str:
        return f"{self._kind}-{self._id}"

    def _change(self, change: Callable[[dict[str, float]], dict[str, float]]) -> None:
        key = activity_key(self._dataset)
        for attempt in range(200):
            self._store.create_versioned(key, {"format": FORMAT, "holders": {}})
            read = self._store.read_versioned(key)
            after = change(_living(read.document))
            if self._store.replace_versioned(key, {"format": FORMAT, "holders": after}, read=read):
                return
            time.sleep(0.01 * min(attempt, 20))
        raise InfrastructureError(f"{key} could not be updated: too many writers")


def _living(document: Mapping[str, Any]) -> dict[str, float]:
    """Without those whose claim has lapsed by this machine's clock."""
    return {name: lapses for name, lapses in document["holders"].items() if lapses > time.time()}


@contextmanager
def writing(store: Store, dataset: str, *, seconds: float = LEASE_SECONDS) -> Iterator[Lease]:
    """While shards are sent: no collector begins. Many writers may be at it."""
    yield from _held(Lease(store, dataset, "writer", seconds=seconds))


@contextmanager
def collecting(store: Store, dataset: str, *, seconds: float = LEASE_SECONDS) -> Iterator[Lease]:
    """While garbage is deleted: no writer and no other collector begins."""
    yield from _held(Lease(store, dataset, "collector", seconds=seconds))


def _held(lease: Lease) -> Iterator[Lease]:
    lease.enter()
    try:
        yield lease
    except BaseException:
        with suppress(InfrastructureError):  # what happened before is worse; the claim lapses by itself
            lease.leave()
        raise
    lease.leave()
