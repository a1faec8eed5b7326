"""Who works on a dataset: any number of writers, or one collector of garbage, never both.

One conditional document per dataset holds their claims and the time at which each lapses, so that the dead block
nobody for long (docs/protocols.md, "Collecting garbage").
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Literal

from training.data.activity import Activity, change_activity, note_newest
from training.data.manifest import Manifest, manifest_key
from training.errors import InfrastructureError, UnbrokenError, UserError
from training.s3.objectstore import Store

LEASE_SECONDS = 600.0
RENEWALS = 4
"""So often is a claim renewed before it would lapse."""
WAIT_SECONDS = 0.25
MARGIN = 0.1
"""Share of a lease that is given up at its end by this process, and added by all others: together, what the clocks of
two machines may be apart, and what a request may take to be applied."""

Kind = Literal["writer", "collector"]
Holders = dict[str, float]
log = logging.getLogger(__name__)


class BusyError(UserError):
    """Somebody of the other kind is at work."""


class Lease:
    """A claim on a dataset, renewed in the background while it is held.

    A claim that is still in the document was never taken over, whatever the clocks say: who enters strikes out those
    that have lapsed.
    """

    def __init__(self, store: Store, dataset: str, kind: Kind, *, seconds: float) -> None:
        self._store = store
        self._dataset = dataset
        self._kind = kind
        self._name = f"{kind}-{uuid.uuid4().hex}-{os.getpid()}-{socket.gethostname()}"
        self._seconds = seconds
        self._sure_until = 0.0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._renew_for_ever, name="lease", daemon=True)

    def enter(self) -> None:
        """A writer waits until no garbage is collected; a collector raises `BusyError` if anybody is at work."""
        self.enter_again()
        self._thread.start()

    def enter_again(self) -> None:
        """After the claim has lapsed. What was found before must be looked at again: a collector may have been here."""
        has_told = False
        while not self._try_to_enter():
            if not has_told:
                log.warning("dataset %s: waiting until its garbage is collected", self._dataset)
                has_told = True
            time.sleep(WAIT_SECONDS)

    def leave(self) -> None:
        self._stopped.set()
        self._thread.join()
        self._change(self._without_me)

    def renew(self) -> None:
        """Raises `InfrastructureError` if the claim has lapsed."""
        self._claim(self._renewed)

    @property
    def is_sure(self) -> bool:
        """Whether a request that is sent now is applied while the claim holds, whatever other machines' clocks say."""
        return _now() < self._sure_until - MARGIN * self._seconds

    def require_sure(self) -> None:
        """Raises `InfrastructureError` if the claim may have lapsed (this process was stopped, or the store away)."""
        if not self.is_sure:
            raise InfrastructureError(
                f"dataset {self._dataset!r}: this process was away for so long that others may have begun to clean up;"
                " run it again: what is finished is found"
            )

    def _try_to_enter(self) -> bool:
        try:
            self._claim(self._entered)
        except BusyError:
            if self._kind == "collector":
                raise
            return False
        return True

    def _claim(self, change: Callable[[Holders], Holders]) -> None:
        asked = _now()
        self._change(change)
        self._sure_until = asked + self._seconds

    def _renew_for_ever(self) -> None:
        while not self._stopped.wait(self._seconds / RENEWALS):
            with suppress(UnbrokenError):  # `is_sure` tells, should it last
                self.renew()

    def _entered(self, holders: Holders) -> Holders:
        others = {name: lapses for name, lapses in holders.items() if self._excludes(name)}
        if others:
            one = next(iter(others))
            who = "a writer is at work" if one.startswith("writer") else "garbage is being collected"
            raise BusyError(
                f"dataset {self._dataset!r}: {who}{_where(one)}; try again when it is done"
                f" (if it died, in {max(others.values()) - time.time():.0f} s)"
            )
        return self._with_me(holders)

    def _excludes(self, other: str) -> bool:
        return other != self._name and (self._kind == "collector" or other.startswith("collector"))

    def _renewed(self, holders: Holders) -> Holders:
        if self._name not in holders:
            raise InfrastructureError(f"dataset {self._dataset!r}: this process's claim has lapsed: run it again")
        return self._with_me(holders)

    def _with_me(self, holders: Holders) -> Holders:
        return {**holders, self._name: time.time() + (1 + MARGIN) * self._seconds}

    def _without_me(self, holders: Holders) -> Holders:
        return {name: lapses for name, lapses in holders.items() if name != self._name}

    def _change(self, change: Callable[[Holders], Holders]) -> None:
        def changed(activity: Activity) -> Activity:
            living = {name: lapses for name, lapses in activity.holders.items() if lapses > time.time()}
            return replace(activity, holders=change(living))

        change_activity(self._store, self._dataset, changed)


def _where(name: str) -> str:
    """By which process, as its claim's name tells."""
    _, _, *told = name.split("-", 3)
    return f" (process {told[0]} on {told[1]})" if len(told) == 2 else ""


def publish(store: Store, dataset: str, manifest: Manifest, lease: Lease) -> None:
    """Write a version's manifest, last, under the claim that its shards were found or sent under.

    It is written although it is there: a damaged one is so repaired, and what was sharded last is the newest version.
    Raises `InfrastructureError` if the claim may have lapsed before the manifest is there.
    """
    lease.require_sure()
    store.put_proven(manifest_key(dataset, manifest.digest), manifest.to_bytes(), sha256=manifest.digest)
    lease.require_sure()
    note_newest(store, dataset, manifest.digest)


def _now() -> float:
    """Seconds of a clock that nobody sets, and that goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@contextmanager
def writing(store: Store, dataset: str, *, seconds: float = LEASE_SECONDS) -> Iterator[Lease]:
    """While shards are sent, or versions come and go: no collector begins. Many writers may be at it."""
    with _held(Lease(store, dataset, "writer", seconds=seconds)) as lease:
        yield lease


@contextmanager
def collecting(store: Store, dataset: str, *, seconds: float = LEASE_SECONDS) -> Iterator[Lease]:
    """While garbage is deleted: no writer and no other collector begins. Raises `BusyError` if one is at work."""
    with _held(Lease(store, dataset, "collector", seconds=seconds)) as lease:
        yield lease


@contextmanager
def _held(lease: Lease) -> Iterator[Lease]:
    lease.enter()
    try:
        yield lease
    finally:
        with suppress(InfrastructureError):  # what was done is done; the claim lapses by itself
            lease.leave()
