"""A dataset version: one immutable manifest that lists content-addressed shards. Its sha256 names the version."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from training.data.shard import Shard, decode_shard
from training.documents import canonical_json, fast_digest, parse, read_document, sha256_hex
from training.errors import DamagedError, MissingError, UserError
from training.s3.objectstore import Store

FORMAT = 1
Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """One shard: its name (sha256), the reader's fast digest, and its size."""

    sha256: str
    xxh3: str
    num_samples: int
    num_bytes: int


def describe_shard(*pieces: bytes | memoryview, num_samples: int) -> ShardInfo:
    """What the manifest says of an encoded shard."""
    num_bytes = sum(map(len, pieces))
    return ShardInfo(
        sha256=sha256_hex(*pieces), xxh3=fast_digest(*pieces), num_samples=num_samples, num_bytes=num_bytes
    )


@dataclass(frozen=True, kw_only=True)
class FieldInfo:
    """dtype and shape of one field of a sample. A first length of None: it differs from sample to sample."""

    dtype: str
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join('any' if length is None else str(length) for length in self.shape)}]"


def difference(fields: Mapping[str, FieldInfo], before: Mapping[str, FieldInfo]) -> str:
    """In which fields samples are not like those before; nothing if in none."""
    told = [f"field {name!r} is new" for name in fields if name not in before]
    told += [f"field {name!r} is missing" for name in before if name not in fields]
    for name, was in before.items():
        now = fields.get(name, was)
        if now != was:
            told.append(f"field {name!r} is {now}, not {was}")
            if now.dtype == was.dtype and now.shape and was.shape and now.shape[1:] == was.shape[1:]:
                told[-1] += " (may its length differ? Then name it in the recipe's `ragged`)"
    return "; ".join(told)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything a reader needs to know of a dataset version."""

    fields: Mapping[str, FieldInfo]
    splits: Mapping[Split, tuple[ShardInfo, ...]]
    classes: tuple[str, ...] = ()
    """If the source's folders are labels: their names. A record's label is an index into these."""

    def num_samples(self, split: Split) -> int:
        return sum(shard.num_samples for shard in self.splits[split])

    def shard_sizes(self, split: Split) -> tuple[int, ...]:
        """The samples of each shard."""
        return tuple(shard.num_samples for shard in self.splits[split])

    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shards in self.splits.values() for shard in shards)

    def to_json(self) -> dict[str, Any]:
        document = {"format": FORMAT, **asdict(self)}
        if not self.classes:
            del document["classes"]
        return document

    def to_bytes(self) -> bytes:
        return canonical_json(self.to_json())

    @property
    def digest(self) -> str:
        return sha256_hex(self.to_bytes())

    @staticmethod
    def from_bytes(data: bytes) -> Manifest:
        document = read_document(data, what="a dataset manifest")
        if document.pop("format", None) != FORMAT:
            raise DamagedError(f"a dataset manifest has another format than {FORMAT}: it needs another release")
        manifest = parse(Manifest, document)
        if missing := [split for split in SPLITS if split not in manifest.splits]:
            raise DamagedError(f"a dataset manifest is damaged: splits.{missing[0]}: it is missing")
        return manifest


def shard_key(dataset: str, sha256: str) -> str:
    return f"datasets/{dataset}/shards/{sha256}"


def receipt_key(dataset: str, fingerprint: str) -> str:
    return f"datasets/{dataset}/parts/{fingerprint}.json"


def manifest_key(dataset: str, digest: str) -> str:
    return f"datasets/{dataset}/manifests/{digest}.json"


def load_manifest(store: Store, dataset: str, digest: str) -> Manifest:
    """Raises `UserError` if there is no such version, `DamagedError` if its bytes are not what its name says."""
    try:
        data = store.get_proven(manifest_key(dataset, digest), sha256=digest)
    except MissingError as error:
        raise UserError(f"dataset {dataset!r} has no version {digest[:12]}: run the shard stage again") from error
    except DamagedError as error:
        raise DamagedError(
            f"{error}. Shard the source of that version again, and it is written anew; or remove it with"
            f" `unbroken data rm {dataset}@{digest[:12]}`"
        ) from error
    return Manifest.from_bytes(data)


def load_shard(store: Store, dataset: str, info: ShardInfo) -> Shard:
    """A whole shard. Raises `DamagedError` if its bytes are not what its name says."""
    key = shard_key(dataset, info.sha256)
    data = store.fetch(key)
    if sha256_hex(data) != info.sha256:
        raise DamagedError(f"{store.location.uri(key)} is damaged: its sha256 is not {info.sha256}")
    return decode_shard(data, name=info.sha256)
