"""What a writer need not do: partitions with a receipt whose shards are whole, and shards that are there."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass

from training.data.manifest import SPLITS, FieldInfo, ShardInfo, Split, load_shard, shard_key
from training.data.withdrawn import records_in
from training.documents import parse, sealed, sha256_hex, unsealed
from training.errors import DamagedError, MissingError
from training.s3.objectstore import Store


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What one finished partition gave."""

    fields: dict[str, FieldInfo]
    splits: dict[Split, tuple[ShardInfo, ...]]
    displaced: tuple[str, ...] = ()
    """Records left out by their id, whose content is not what was withdrawn under it: the source has changed since."""


class Finished:
    """Looked at by one writer. Where no shard is when it begins, nothing is finished, and it asks for nothing."""

    def __init__(self, store: Store, dataset: str, *, withdrawn_contents: Collection[str]) -> None:
        """A partition with a record of these contents is not finished, whatever its receipt says."""
        self._store = store
        self._dataset = dataset
        self._withdrawn_contents = withdrawn_contents
        self._sent: set[str] = set()
        self.is_nothing = not any(True for _ in store.list_entries(shard_key(dataset, "")))

    def look_again(self) -> None:
        """After a collector may have been here: what this writer sent is finished, if it is there."""
        self.is_nothing = False

    def maybe_receipt(self, key: str) -> Receipt | None:
        """The receipt, if it is there and all its shards are whole."""
        if self.is_nothing:
            return None
        try:
            found = parse(Receipt, unsealed("receipt", self._store.get(key)))
            return found if all(self._is_whole(found.splits[split]) for split in SPLITS) else None
        except (MissingError, DamagedError, KeyError):  # it names no shards of a split
            return None

    def _is_whole(self, shards: Sequence[ShardInfo]) -> bool:
        """Whether the shards are what their names say, and hold nothing that was withdrawn elsewhere since.

        Raises `MissingError` or `DamagedError` if they are not.
        """
        loaded = (load_shard(self._store, self._dataset, shard) for shard in shards)
        if self._withdrawn_contents:
            return all(record.content not in self._withdrawn_contents for record in records_in(loaded))
        return all(len(shard) for shard in loaded)

    def put_receipt(self, key: str, receipt: Receipt) -> None:
        document = sealed("receipt", asdict(receipt))
        self._store.send(key, document, sha256=sha256_hex(document))

    def put_shard(self, sha256: str, pieces: Sequence[bytes | memoryview]) -> bool:
        """False if it is there already, and whole."""
        key = shard_key(self._dataset, sha256)
        if not self.is_nothing or sha256 in self._sent:
            return self._store.put_immutable(key, *pieces, sha256=sha256)
        self._sent.add(sha256)  # before it is: of a lost reply nobody knows whether it was applied
        self._store.send(key, *pieces, sha256=sha256)
        return True
