"""The model file on the store, and what is known of a version beside it: all that serving it needs.

The file is the exported program of `tasks.register`. Its bytes depend on the release of torch too, so nobody relies on
making them again: those that were kept first are the version's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from training.documents import digest_of, parse, sha256_hex
from training.errors import DamagedError, InfrastructureError, MissingError, UserError
from training.s3.objectstore import Store, Versioned
from training.signatures import require_signed, sign

FORMAT = 1
KIND = "model version"
"""What is signed."""


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
class Program:
    """An exported program, as it was registered."""

    data: bytes
    signature: Signature


def file_key(model: str, sha256: str) -> str:
    return f"models/{model}/files/{sha256}.pt2"


def version_key(model: str, version: str) -> str:
    return f"models/{model}/versions/{version}.json"


def keep(
    store: Store,
    model: str,
    version: str,
    *,
    run_key: str,
    weights_sha256: str,
    dataset_digest: str,
    fetch: Callable[[], Program],
) -> KeptVersion:
    """Keep a version's file, read back, and then its document; or find both, whoever kept them.

    A file that is missing or damaged by now is fetched again. Raises `DamagedError` if that gives other bytes.
    """
    known = _find(store, model, version)
    if known is not None and not _is_of(known, run_key, weights_sha256):
        known = None
    if known is not None and _is_whole(store, known):
        return known
    program = fetch()
    sha256 = sha256_hex(program.data)
    if known is not None and known.model_sha256 != sha256:
        raise DamagedError(
            f"{store.location.uri(file_key(model, known.model_sha256))} is missing or damaged, and MLflow has other"
            f" bytes of version {version} than were kept: {sha256}"
        )
    store.put_immutable(file_key(model, sha256), program.data, sha256=sha256)
    store.get_proven(file_key(model, sha256), sha256=sha256)
    made = KeptVersion(
        model=model,
        version=version,
        run_key=run_key,
        weights_sha256=weights_sha256,
        dataset_digest=dataset_digest,
        model_sha256=sha256,
        num_bytes=len(program.data),
        signature=program.signature,
    )
    _note(store, made)
    return find(store, model, version)


def _note(store: Store, made: KeptVersion) -> None:
    """Create the document; only another run's is replaced: the registry was emptied, and numbers versions anew."""
    key = version_key(made.model, made.version)
    if store.create_versioned(key, _to_json(made)):
        return
    read = store.read_versioned(key)
    if not _is_of(_from_json(store, key, read), made.run_key, made.weights_sha256):
        store.replace_versioned(key, _to_json(made), read=read)


def find(store: Store, model: str, version: str) -> KeptVersion:
    """Raises `UserError` if nothing was kept of it, `DamagedError` if what was is no such document."""
    found = _find(store, model, version)
    if found is None:
        raise UserError(
            f"model {model!r} version {version} has no model file on the store: it was registered elsewhere, or before"
            " these were kept; to run its pipeline again keeps it"
        )
    return found


def prove(store: Store, kept: KeptVersion) -> bytes:
    """The model file's bytes. Raises `DamagedError` if they are missing or not those that were kept."""
    key = file_key(kept.model, kept.model_sha256)
    try:
        return store.get_proven(key, sha256=kept.model_sha256)
    except MissingError as error:
        raise DamagedError(f"{store.location.uri(key)} is missing, the model file of version {kept.version}") from error


def _is_whole(store: Store, kept: KeptVersion) -> bool:
    try:
        prove(store, kept)
    except DamagedError:
        return False
    return True


def _is_of(kept: KeptVersion, run_key: str, weights_sha256: str) -> bool:
    return (kept.run_key, kept.weights_sha256) == (run_key, weights_sha256)


def _find(store: Store, model: str, version: str) -> KeptVersion | None:
    key = version_key(model, version)
    try:
        return _from_json(store, key, store.read_versioned(key))
    except MissingError:
        return None


def sign_again(store: Store, model: str, version: str) -> KeptVersion:
    """Sign the document with this process's key, once the file is proven: for whoever knows that they are what they
    should be. Raises `DamagedError`, and `InfrastructureError` if it changed meanwhile."""
    key = version_key(model, version)
    read = store.read_versioned(key)
    kept = _parsed(store, key, read)
    prove(store, kept)
    if not store.replace_versioned(key, _to_json(kept), read=read):
        raise InfrastructureError(f"{store.location.uri(key)} changed meanwhile, and is not signed: try again")
    return kept


def _to_json(kept: KeptVersion) -> dict[str, Any]:
    content = asdict(kept)
    return {"format": FORMAT, "kept": content, "sha256": digest_of(content), "signature": sign(KIND, content)}


def _from_json(store: Store, key: str, found: Versioned) -> KeptVersion:
    """Raises `DamagedError`, or `UntrustedError` if this process has a key and another or none signed it."""
    kept = _parsed(store, key, found)
    require_signed(
        KIND,
        asdict(kept),
        found.document.get("signature"),
        name=store.location.uri(key),
        remedy=f"`unbroken models sign {kept.model}` signs it",
    )
    return kept


def _parsed(store: Store, key: str, found: Versioned) -> KeptVersion:
    kept = found.document.get("kept")
    if found.document.get("format") != FORMAT or found.document.get("sha256") != digest_of(kept):
        raise DamagedError(f"{store.location.uri(key)} is damaged, or of another format than {FORMAT}")
    parsed = parse(KeptVersion, kept)
    if version_key(parsed.model, parsed.version) != key:
        raise DamagedError(f"{store.location.uri(key)} is of version {parsed.version} of model {parsed.model!r}")
    return parsed
