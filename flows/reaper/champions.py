"""The alias `champion` of each model: moved if whoever should have is dead; adopted or put back if a person did."""

from __future__ import annotations

import logging
import time

from flows.reaper.attempt import attempt
from infra.settings import Settings
from tasks.lifecycle import champions, projection
from tasks.lifecycle.policy import moved_by_hand
from training.errors import UnbrokenError
from training.s3.objectstore import Store

log = logging.getLogger(__name__)

LOOK_SECONDS = 10.0


class Champions:
    """Those of the models on one store."""

    def __init__(self, uri: str, store: Store) -> None:
        self._uri = uri
        self._store = store
        self._told: dict[str, str] = {}

    def set_right(self) -> None:
        """One look at each. Raises `UserError` for a wrong policy, `InfrastructureError` if the store is away."""
        policy = moved_by_hand()
        for model in champions.models(self._store):
            try:
                done = projection.set_right(self._uri, self._store, model, policy)
            except UnbrokenError as error:  # such as a damaged document: the others are looked at all the same
                if self._told.get(model) != str(error):
                    log.warning("the champion of model %s: %s", model, error)
                self._told[model] = str(error)
                continue
            self._told.pop(model, None)
            if done:
                log.info("the champion of model %s: %s", model, done)


def watch_champions(settings: Settings, store: Store) -> None:
    """Look at them for ever. In a thread: an MLflow that hangs keeps nobody from looking at flow runs."""
    watched = Champions(settings.mlflow_uri, store)
    while True:
        attempt("the champions", watched.set_right)
        time.sleep(LOOK_SECONDS)
