"""models/NAME/champion.json on the store: read, made once, and changed by one replace each time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from tasks.lifecycle.champion import Champion, Change, begun, from_json, to_json
from training.errors import DamagedError, InfrastructureError, MissingError, UserError
from training.s3.objectstore import Store, Versioned
from training.signatures import require_signed, sign

KIND = "champion"
"""What is signed."""


def champion_key(model: str) -> str:
    return f"models/{model}/champion.json"


def models(store: Store) -> list[str]:
    """The names under which something is kept."""
    return store.list_folders("models/")


def begin(store: Store, model: str, change: Change) -> Champion:
    """The model's document, made with this first champion if there is none."""
    store.create_versioned(champion_key(model), _signed(begun(model, change, now=time.time())))
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
        if store.replace_versioned(key, _signed(after), read=read):
            return after
        time.sleep(0.01 * min(attempt, 20))
    raise InfrastructureError(f"{store.location.uri(key)} could not be updated: too many writers")


def sign_again(store: Store, model: str) -> Champion:
    """Sign the document with this process's key: for whoever knows that it is what it should be.

    Raises `MissingError` if there is none, `InfrastructureError` if it changed meanwhile.
    """
    key = champion_key(model)
    read = store.read_versioned(key)
    champion = _unproven(store, model, read)
    if not store.replace_versioned(key, _signed(champion), read=read):
        raise InfrastructureError(f"{store.location.uri(key)} changed meanwhile, and is not signed: try again")
    return champion


def parsed(store: Store, model: str, found: Versioned) -> Champion:
    """Raises `DamagedError`, which names the object, and `UntrustedError` if this process has a key and another or none
    signed it."""
    champion = _unproven(store, model, found)
    require_signed(
        KIND,
        to_json(champion),
        found.document.get("signature"),
        name=store.location.uri(champion_key(model)),
        remedy=f"`unbroken models sign {model}` signs it",
    )
    return champion


def _signed(champion: Champion) -> dict[str, Any]:
    return {**to_json(champion), "signature": sign(KIND, to_json(champion))}


def _unproven(store: Store, model: str, found: Versioned) -> Champion:
    try:
        champion = from_json(found.document)
        if champion.model != model:
            raise DamagedError(f"it is of model {champion.model!r}")
    except DamagedError as error:
        raise DamagedError(f"{store.location.uri(champion_key(model))}: {error}") from error
    return champion
