"""What the follower has the front switch to, look by look, with a real store."""

from __future__ import annotations

import pytest

from tasks.lifecycle.champions import champion_key
from tasks.lifecycle.model_file import KeptVersion, file_key
from tasks.serving import follow, published
from tasks.serving.follow import Follower
from tasks.serving.metrics import Metrics
from tasks.serving.offer import Offer
from tests.faults.proxy import LosingProxy
from tests.serving.models import keep, promote
from training.errors import DamagedError
from training.s3.objectstore import Store


class Served:
    """A follower of a model, and what it had served."""

    def __init__(self, store: Store, first: KeptVersion) -> None:
        self.versions: list[str] = []
        self.maybe_refusal: str | None = None
        self.follower = Follower(
            store,
            first.model,
            champion=published.find_champion(store, first.model),
            served=first.identity,
            switch=self._switch,
            metrics=Metrics(),
        )

    def _switch(self, offer: Offer) -> None:
        with open(offer.told()["path"], "rb") as file:
            assert file.read() == f"bytes of {offer.kept.version}".encode()
        offer.close()
        if self.maybe_refusal is not None:
            raise DamagedError(self.maybe_refusal)
        self.versions.append(offer.kept.version)


def _kept(store: Store, version: str) -> KeptVersion:
    return keep(store, "m", version, f"bytes of {version}".encode())


def test_each_change_is_served_once(store: Store) -> None:
    first, second = _kept(store, "1"), _kept(store, "2")
    promote(store, first)
    served = Served(store, first)
    for kept in (None, second, None, first, first, second):
        if kept is not None:
            promote(store, kept)
        served.follower.look()
    assert served.versions == ["2", "1", "2"]


def test_what_was_refused_is_tried_again_when_it_is_mended(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = _kept(store, "1"), _kept(store, "2")
    promote(store, first)
    served = Served(store, first)
    store.put(file_key("m", second.model_sha256), b"other bytes")
    promote(store, second)
    served.follower.look()
    assert "is damaged" in served.follower.refused
    store.put(file_key("m", second.model_sha256), b"bytes of 2")
    served.follower.look()
    assert served.versions == []  # not at every look
    monkeypatch.setattr(follow, "LOOK_AGAIN_SECONDS", 0.0)
    promote(store, second)
    served.maybe_refusal = "will not run"
    served.follower.look()
    assert served.follower.refused == "will not run"
    served.maybe_refusal = None
    served.follower.look()
    assert (served.versions, served.follower.refused) == (["2"], "")


def test_a_document_that_is_none_is_refused(store: Store) -> None:
    first = _kept(store, "1")
    promote(store, first)
    served = Served(store, first)
    store.put(champion_key("m"), b'{"format": 2, "entries": []}')
    served.follower.look()
    assert "champion.json" in served.follower.refused
    store.delete(champion_key("m"))
    served.follower.look()
    assert "does not exist" in served.follower.store_trouble
    assert served.versions == []


@pytest.mark.usefixtures("quick_retries")
def test_a_store_that_goes_away_half_way(store: Store, behind_proxy: Store, proxy: LosingProxy) -> None:
    """The change was seen, its file not: it is fetched when the store is back, without another change."""
    first, second = _kept(store, "1"), _kept(store, "2")
    promote(store, first)
    served = Served(behind_proxy, first)
    promote(store, second)
    proxy.maybe_refused = "/files/"
    served.follower.look()
    assert proxy.num_refused > 0
    assert served.follower.store_trouble
    assert served.versions == []
    proxy.maybe_refused = None
    served.follower.look()
    assert (served.versions, served.follower.store_trouble) == (["2"], "")
