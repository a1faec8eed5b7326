"""Looks at who is champion, and has the front switch. Whatever is wrong with the new one, the old one serves on."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError

from tasks.serving import published
from tasks.serving.metrics import Metrics
from tasks.serving.offer import Offer, fetch
from tasks.serving.published import SeenChampion
from training.errors import InfrastructureError, UnbrokenError
from training.s3.objectstore import Store

log = logging.getLogger(__name__)

LOOK_AGAIN_SECONDS = 30.0
"""At a champion that was refused: its bytes may have been mended."""


class Follower:
    """Runs in a thread of its own, since the store may keep it waiting.

    `switch` returns when the version that it was given is served, and raises `UnbrokenError` to refuse it.
    """

    def __init__(
        self,
        store: Store,
        model: str,
        *,
        champion: SeenChampion,
        served: str,
        switch: Callable[[Offer], None],
        metrics: Metrics,
    ) -> None:
        self._store = store
        self._model = model
        self._champion = champion
        self._served = served
        self._switch = switch
        self._metrics = metrics
        self._maybe_next_try: float | None = None
        self.refused = ""
        """Why the champion is not what is served."""
        self.store_trouble = ""

    def start(self, *, every_seconds: float) -> None:
        def follow() -> None:
            while True:
                time.sleep(every_seconds)
                self.look()

        threading.Thread(target=follow, name="follow", daemon=True).start()

    def look(self) -> None:
        """Once."""
        try:
            self._look()
            self._note_store("")
        except CancelledError:  # the front has ended
            return
        except InfrastructureError as error:
            self._note_store(str(error))
        except UnbrokenError as error:
            self._refuse(str(error))

    def _look(self) -> None:
        changed = published.changed_champion(self._store, self._model, etag=self._champion.etag)
        if changed is not None:
            self._champion, self._maybe_next_try = changed, 0.0
        if self._maybe_next_try is None or time.monotonic() < self._maybe_next_try:
            return
        kept = published.of_champion(self._store, self._model, self._champion)
        if kept.identity != self._served:
            self._switch(fetch(self._store, kept))
            self._served = kept.identity
            log.warning("version %s of %s is served from now on", kept.version, self._model)
        self._maybe_next_try, self.refused = None, ""
        self._metrics.is_behind.set(0)

    def _refuse(self, why: str) -> None:
        self._maybe_next_try = time.monotonic() + LOOK_AGAIN_SECONDS
        if why != self.refused:
            log.error("version %s is refused, the one before serves on: %s", self._champion.version, why)
        self._metrics.refusals.inc()
        self._metrics.is_behind.set(1)
        self.refused = why  # last: whoever reads it finds the numbers true

    def _note_store(self, trouble: str) -> None:
        if bool(trouble) != bool(self.store_trouble):
            log.warning("%s", f"the store is away, and this serves on: {trouble}" if trouble else "the store is back")
        self.store_trouble = trouble
        self._metrics.store_away.set(bool(trouble))
