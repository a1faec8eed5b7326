"""What the store has of a model that can be served: who is champion, and whether that has changed; only read here."""

from __future__ import annotations

from dataclasses import dataclass

from tasks.lifecycle import champions, model_file
from tasks.lifecycle.champions import champion_key
from tasks.lifecycle.model_file import KeptVersion, version_key
from training.errors import DamagedError, MissingError, UserError
from training.s3.objectstore import Store, Versioned


@dataclass(frozen=True, kw_only=True)
class SeenChampion:
    """The newest entry of a model's history, and the ETag by which a change of it is seen."""

    version: str
    model_sha256: str
    """Empty where it became champion before model files were kept."""
    etag: str


def find_champion(store: Store, model: str) -> SeenChampion:
    """Raises `UserError` if the model is unknown or has no champion."""
    try:
        return _seen(store, model, store.read_versioned(champion_key(model)))
    except MissingError:
        raise _unknown(store, model) from None


def changed_champion(store: Store, model: str, *, etag: str) -> SeenChampion | None:
    """The champion, if its document is another one than that of `etag`. Costs one small request if not."""
    found = store.read_if_changed(champion_key(model), etag=etag)
    return _seen(store, model, found) if found is not None else None


def find_version(store: Store, model: str, version: str) -> KeptVersion:
    """Raises `UserError` if nothing was kept of it, `DamagedError` if its document is not one."""
    if not _is_known(store, model):
        raise _unknown(store, model)
    return model_file.find(store, model, version)


def of_champion(store: Store, model: str, champion: SeenChampion) -> KeptVersion:
    """The champion's version. Raises as `find_version` does, and `DamagedError` if it is not what became champion."""
    kept = model_file.find(store, model, champion.version)
    if champion.model_sha256 not in ("", kept.model_sha256):
        raise DamagedError(
            f"{store.location.uri(version_key(model, kept.version))} names other bytes than became champion"
            f" ({champion.model_sha256[:12]})"
        )
    return kept


def _seen(store: Store, model: str, found: Versioned) -> SeenChampion:
    newest = champions.parsed(store, model, found).current
    return SeenChampion(version=newest.version, model_sha256=newest.model_sha256, etag=found.etag)


def _unknown(store: Store, model: str) -> UserError:
    if _is_known(store, model):
        return UserError(f"model {model!r} has no champion: promote a version, or serve one with {model}/VERSION")
    known = ", ".join(champions.models(store)) or "none yet"
    return UserError(f"no model {model!r} at {store.location.uri('models/')}: there is {known}")


def _is_known(store: Store, model: str) -> bool:
    return any(store.list_keys(f"models/{model}/"))
