"""What the store has of a model that can be served: who is champion, and each version's document and file.

Written by registration and promotion; only read here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from training.documents import digest_of, parse
from training.errors import DamagedError, MissingError, UserError
from training.s3.objectstore import Store, Versioned


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """What goes in or comes out: its dtype by numpy's name, and its shape with -1 for the batch."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Signature:
    """Of a model: one tensor in, one out."""

    inputs: Tensor
    outputs: Tensor


@dataclass(frozen=True, kw_only=True)
class KeptVersion:
    """What the store knows of one version of a model."""

    model: str
    version: str
    run_key: str
    weights_sha256: str
    dataset_digest: str
    model_sha256: str
    num_bytes: int
    signature: Signature

    @property
    def identity(self) -> str:
        """Whose bytes these are: a registry that was emptied numbers its versions anew."""
        return f"{self.version}:{self.model_sha256}"


@dataclass(frozen=True, kw_only=True)
class Champion:
    """The newest entry of a model's history, and the ETag by which a change of it is seen."""

    version: str
    model_sha256: str
    """Empty where it became champion before model files were kept."""
    etag: str


def champion_key(model: str) -> str:
    return f"models/{model}/champion.json"


def version_key(model: str, version: str) -> str:
    return f"models/{model}/versions/{version}.json"


def file_key(model: str, sha256: str) -> str:
    return f"models/{model}/files/{sha256}.pt2"


def find_champion(store: Store, model: str) -> Champion:
    """Raises `UserError` if the model is unknown or has no champion."""
    try:
        return _champion_of(store, model, store.read_versioned(champion_key(model)))
    except MissingError:
        raise _unknown(store, model) from None


def changed_champion(store: Store, model: str, *, etag: str) -> Champion | None:
    """The champion, if its document is another one than that of `etag`. Costs one small request if not."""
    found = store.read_if_changed(champion_key(model), etag=etag)
    return _champion_of(store, model, found) if found is not None else None


def find_version(store: Store, model: str, version: str) -> KeptVersion:
    """Raises `UserError` if no file was kept of it, `DamagedError` if its document is not one."""
    key = version_key(model, version)
    try:
        found = store.read_versioned(key).document
    except MissingError:
        if not _is_known(store, model):
            raise _unknown(store, model) from None
        raise UserError(
            f"model {model!r} version {version} has no model file on the store: it was registered elsewhere, or before"
            " these were kept. To run its pipeline again keeps it; `mlflow models serve` serves it as it is"
        ) from None
    kept = found.get("kept")
    if found.get("format") != 1 or found.get("sha256") != digest_of(kept):
        raise DamagedError(f"{store.location.uri(key)} is damaged, or of another format than 1")
    return parse(KeptVersion, kept)


def of_champion(store: Store, model: str, champion: Champion) -> KeptVersion:
    """The champion's version. Raises as `find_version` does, and `DamagedError` if it is not what became champion."""
    kept = find_version(store, model, champion.version)
    if champion.model_sha256 not in ("", kept.model_sha256):
        raise DamagedError(
            f"{store.location.uri(version_key(model, kept.version))} names other bytes than became champion"
            f" ({champion.model_sha256[:12]})"
        )
    return kept


def read_file(store: Store, kept: KeptVersion) -> bytes:
    """The exported program. Raises `DamagedError` if its bytes are missing, or not those that were kept."""
    key = file_key(kept.model, kept.model_sha256)
    try:
        return store.get_proven(key, sha256=kept.model_sha256)
    except MissingError as error:
        raise DamagedError(f"{store.location.uri(key)} is missing, the model file of version {kept.version}") from error


def _champion_of(store: Store, model: str, found: Versioned) -> Champion:
    """Of a document with the whole history (format 2), or with the first champion alone (format 1)."""
    document: dict[str, Any] = found.document
    try:
        if document["format"] == 1:
            return Champion(version=str(document["version_of_registry"]), model_sha256="", etag=found.etag)
        newest = document["entries"][-1]
        return Champion(version=str(newest["version"]), model_sha256=str(newest["model_sha256"]), etag=found.etag)
    except (KeyError, IndexError, TypeError) as error:
        raise DamagedError(f"{store.location.uri(champion_key(model))} is damaged: it names no champion") from error


def _unknown(store: Store, model: str) -> UserError:
    if _is_known(store, model):
        return UserError(f"model {model!r} has no champion: promote a version, or serve one with {model}/VERSION")
    known = ", ".join(store.list_folders("models/")) or "none yet"
    return UserError(f"no model {model!r} at {store.location.uri('models/')}: there is {known}")


def _is_known(store: Store, model: str) -> bool:
    return any(store.list_keys(f"models/{model}/"))
