"""What a run key is the digest of, kept beside the run with the recipe's source files: a key alone can be compared, but
not read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from training.config import Preset
from training.documents import canonical_json, digest_of, parse, read_document, sha256_hex
from training.errors import DamagedError, MissingError, UserError
from training.recipe import Recipe
from training.runs.record import determining
from training.s3.objectstore import Store
from training.sources import source_closure

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One module of the recipe's source closure."""

    path: str
    """Where it lay when the run was started."""
    text: str
    encoding: Literal["utf-8", "latin-1"] = "utf-8"

    def __post_init__(self) -> None:
        """Raises `ValueError` for a text that the encoding does not have."""
        self.text.encode(self.encoding)

    @property
    def sha256(self) -> str:
        return sha256_hex(self.data)

    @property
    def data(self) -> bytes:
        return self.text.encode(self.encoding)


@dataclass(frozen=True, kw_only=True)
class Identity:
    """All that determines a run's result."""

    determining: dict[str, Any]
    """Its digest is the run key (training.runs.record)."""
    sources: Mapping[str, SourceFile]
    """By the name of the module: what `recipe_source` is the digest of."""
    format: int = FORMAT


def identity_key(run_key: str) -> str:
    return f"runs/{run_key}/identity.json"


def keep_identity(
    store: Store,
    run_key: str,
    *,
    recipe: Recipe,
    preset: Preset,
    dataset_digest: str,
    initial_weights: str | None = None,
) -> None:
    """Keep it, once. Raises `UserError` if the recipe's source has changed since `run_key` was made."""
    sources = {name: source_file(str(path), path.read_bytes()) for name, path in sorted(source_closure(recipe).items())}
    made = Identity(determining=determining(recipe, preset, dataset_digest, initial_weights), sources=sources)
    if wrong := _damage(made, run_key):
        raise UserError(f"the recipe's source changed while the run was started ({wrong}): start it again")
    if _find_whole(store, run_key) is None:  # where the files lie is not part of it: the first starter's stay
        store.put(identity_key(run_key), canonical_json(asdict(made)))


def source_file(path: str, data: bytes) -> SourceFile:
    """As text that gives these bytes again."""
    try:
        return SourceFile(path=path, text=data.decode())
    except UnicodeDecodeError:
        return SourceFile(path=path, text=data.decode("latin-1"), encoding="latin-1")


def _damage(identity: Identity, run_key: str) -> str | None:
    """What of it is not what the run key is of; None if all is."""
    if digest_of(identity.determining) != run_key:
        return f"what is said to determine the result does not give the run key {run_key[:12]}"
    modules = {name: source.sha256 for name, source in identity.sources.items()}
    if digest_of(modules) != identity.determining.get("recipe_source"):
        return "the source files are not those that the run key is of"
    preset = identity.determining.get("preset")
    if not isinstance(preset, dict) or not isinstance(preset.get("train"), dict):
        return "it says no preset"
    return None


def find_identity(store: Store, run_key: str) -> Identity | None:
    """None if an earlier release began the run, and kept none. Raises `DamagedError` if the key is not of it."""
    where = store.location.uri(identity_key(run_key))
    try:
        document = read_document(store.get(identity_key(run_key)), what=where)
    except MissingError:
        return None
    try:
        found = parse(Identity, document)
    except DamagedError as error:
        raise DamagedError(f"{where} is damaged: {error}") from error
    if found.format != FORMAT:
        raise DamagedError(f"{where} has format {found.format}, which this release cannot read")
    if wrong := _damage(found, run_key):
        raise DamagedError(f"{where} is damaged: {wrong}")
    return found


def _find_whole(store: Store, run_key: str) -> Identity | None:
    try:
        return find_identity(store, run_key)
    except DamagedError:
        return None
