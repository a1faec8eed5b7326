"""models/NAME/champion.json on the store: read, made once, and changed by one replace each time."""

from __future__ import annotations

import time
from collections.abc import Callable

from tasks.lifecycle.champion import Champion, Change, begun, from_json, to_json
from training.errors import DamagedError, InfrastructureError, MissingError, UserError
from training.s3.objectstore import Store, Versioned


def champion_key(model: str) -> str:
    return f"models/{model}/champion.json"


def models(store: Store) -> list[str]:
    """The names under which something is kept."""
    return store.list_folders("models/")


def begin(store: Store, model: str, change: Change) -> Champion:
    """The model's document, made with this first champion if there is none."""
    store.create_versioned(champion_key(model), to_json(begun(model, change, now=time.time())))
    return read(store, model)


def find(store: Store, model: str) -> Champion | None:
    """Raises `DamagedError` if what is there is no such document."""
    try:
        return parsed(store, model, store.read_versioned(champion_key(model)))
    except MissingError:
        return None


def read(store: Store, model: str) -> Champion:
    """Raises `UserError` if the model has no champion."""
    found = find(store, model)
    if found is None:
        raise UserError(f"no model {model!r} has a champion on this store: see `unbroken models ls`")
    return found


def change(store: Store, model: str, make: Callable[[Champion], Champion]) -> Champion:
    """Replace the document by `make(document)`, which sees the newest each time and may raise to refuse."""
    key = champion_key(model)
    for attempt in range(200):
        read = store.read_versioned(key)
        after = make(parsed(store, model, read))
        if store.replace_versioned(key, to_json(after), read=read):
            return after
        time.sleep(0.01 * min(attempt, 20))
    raise InfrastructureError(f"{store.location.uri(key)} could not be updated: too many writers")


def parsed(store: Store, model: str, found: Versioned) -> Champion:
    """Raises `DamagedError`, which names the object."""
    try:
        champion = from_json(found.document)
        if champion.model != model:
            raise DamagedError(f"it is of model {champion.model!r}")
    except DamagedError as error:
        raise DamagedError(f"{store.location.uri(champion_key(model))}: {error}") from error
    return champion
