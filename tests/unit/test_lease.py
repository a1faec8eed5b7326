"""Writers and collectors on one dataset: never both, never blocked for long by the dead."""

from __future__ import annotations

import threading
import time

import pytest

from tests.waiting import wait_until
from training.data import lease as lease_module
from training.data.activity import activity_key
from training.data.lease import LEASE_SECONDS, MARGIN, collecting, writing
from training.errors import InfrastructureError, UserError
from training.s3.objectstore import REQUEST_SECONDS, Store


def holders(store: Store) -> list[str]:
    return sorted(name.partition("-")[0] for name in store.read_versioned(activity_key("d")).document["holders"])


def test_many_writers_or_one_collector(store: Store) -> None:
    with writing(store, "d"), writing(store, "d"), writing(store, "other"):
        assert holders(store) == ["writer", "writer"]
        with pytest.raises(UserError, match=r"'d': a writer is at work"), collecting(store, "d"):
            pass
    assert holders(store) == []
    busy = pytest.raises(UserError, match="garbage is being collected")
    with collecting(store, "d"), busy, collecting(store, "d"):
        pass
    assert holders(store) == []


def test_a_writer_waits_until_garbage_is_collected(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    entered: list[list[str]] = []

    def write() -> None:
        with writing(store, "d"):
            entered.append(holders(store))

    writer = threading.Thread(target=write)
    with collecting(store, "d"):
        writer.start()
        wait_until(lambda: "waiting until its garbage is collected" in caplog.text, what="the writer to find it busy")
        assert not entered
    writer.join()
    assert entered == [["writer"]]


def test_margin_covers_a_request_and_a_minute_between_the_clocks() -> None:
    """Deletes are sent once: a later try of the client's own would come after the margin."""
    assert 2 * MARGIN * LEASE_SECONDS >= REQUEST_SECONDS + 60


def a_collector_enters(store: Store) -> bool:
    try:
        with collecting(store, "d"):
            return True
    except UserError:
        return False


def test_the_dead_block_nobody_for_long(store: Store) -> None:
    key = activity_key("d")
    store.create_versioned(key, {"format": 1, "holders": {"writer-dead": time.time() + LEASE_SECONDS}})
    assert not a_collector_enters(store)
    soon = {"format": 1, "holders": {"writer-dead": time.time() + 0.5}}
    assert store.replace_versioned(key, soon, read=store.read_versioned(key))
    wait_until(lambda: a_collector_enters(store), what="the dead writer's claim to lapse")


@pytest.fixture
def quick_renewals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of claims that last as long as ever: no pause of this machine makes them lapse."""
    monkeypatch.setattr(lease_module, "RENEWALS", LEASE_SECONDS / 0.1)


@pytest.mark.usefixtures("quick_renewals")
def test_a_claim_is_renewed_while_it_is_held(store: Store) -> None:
    with writing(store, "d") as lease:
        first = store.read_versioned(activity_key("d")).document["holders"]
        renewed = wait_until(
            lambda: store.read_versioned(activity_key("d")).document["holders"] != first, what="a renewal"
        )
        assert renewed
        wait_until(lambda: lease.is_sure, what="the claim to be sure")


class Later:
    """Both clocks, so many seconds on."""

    CLOCK_BOOTTIME = time.CLOCK_BOOTTIME

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def time(self) -> float:
        return time.time() + self._seconds

    def clock_gettime(self, clock: int) -> float:
        return time.clock_gettime(clock) + self._seconds


def test_a_writer_that_was_away_too_long_is_told(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the process had been stopped: its renewals did not happen, and a collector took over."""
    monkeypatch.setattr("training.data.lease.Lease._renew_for_ever", lambda self: None)
    with writing(store, "d") as lease:
        lease.require_sure()
        assert not a_collector_enters(store)
        monkeypatch.setattr(lease_module, "time", Later(2 * LEASE_SECONDS))
        with pytest.raises(InfrastructureError, match="was away for so long"):
            lease.require_sure()

        assert a_collector_enters(store)
        with pytest.raises(InfrastructureError, match="has lapsed"):
            lease.renew()


def test_what_happened_before_is_not_hidden_by_a_store_that_is_away(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(self: object) -> None:
        raise InfrastructureError("away")

    monkeypatch.setattr("training.data.lease.Lease.leave", away)
    with pytest.raises(ValueError, match="the cause"), writing(store, "d"):
        raise ValueError("the cause")
    with writing(store, "d"):
        pass  # nor is what was done undone by it


@pytest.mark.usefixtures("quick_renewals")
def test_renewals_go_on_after_the_store_was_away(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = Store.replace_versioned

    def sometimes(self: Store, *args: object, **kwargs: object) -> bool:
        calls.append(1)
        if len(calls) in (2, 3):
            raise InfrastructureError("away")
        return real(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Store, "replace_versioned", sometimes)
    with writing(store, "d") as lease:
        wait_until(lambda: len(calls) >= 5 and lease.is_sure, what="a renewal after two failures")
        assert holders(store) == ["writer"]
