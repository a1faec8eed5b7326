"""The manifest: its digest names a dataset version, so its bytes are canonical and proven when read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from training.data.manifest import FieldInfo, Manifest, ShardInfo, load_manifest, manifest_key, shard_key
from training.documents import canonical_json
from training.errors import DamagedError, UserError
from training.s3.objectstore import Store

GOLDEN_FILE = Path(__file__).parents[1] / "golden" / "manifest-format-1.json"
GOLDEN_DIGEST = "fcdd1da86c66ca2b82234f3df028c12daa97f91092867aa839673b2e38c8229e"


def shard_info(number: int) -> ShardInfo:
    return ShardInfo(sha256=f"{number:064x}", xxh3=f"{number:032x}", num_samples=number + 1, num_bytes=100 * number)


MANIFEST = Manifest(
    fields={"x": FieldInfo(dtype="float32", shape=(2, 3)), "label": FieldInfo(dtype="int64", shape=())},
    splits={"train": (shard_info(0), shard_info(1)), "test": (shard_info(2),)},
)


def test_golden_bytes_and_digest() -> None:
    """If this fails, every dataset version would change its name: raise FORMAT, and keep reading the old one."""
    assert MANIFEST.to_bytes() == GOLDEN_FILE.read_bytes()
    assert MANIFEST.digest == GOLDEN_DIGEST
    assert Manifest.from_bytes(GOLDEN_FILE.read_bytes()) == MANIFEST


def test_the_digest_does_not_depend_on_the_order_of_construction() -> None:
    again = Manifest(
        fields={name: MANIFEST.fields[name] for name in reversed(list(MANIFEST.fields))},
        splits={"test": MANIFEST.splits["test"], "train": MANIFEST.splits["train"]},
    )
    assert again.digest == MANIFEST.digest


def test_the_digest_depends_on_the_order_of_shards() -> None:
    first, second = MANIFEST.splits["train"]
    other = Manifest(fields=MANIFEST.fields, splits={**MANIFEST.splits, "train": (second, first)})
    assert other.digest != MANIFEST.digest


def test_counts() -> None:
    assert MANIFEST.num_samples("train") == 3
    assert MANIFEST.num_samples("test") == 3
    assert MANIFEST.num_bytes() == 300


def test_another_format_is_refused() -> None:
    document = json.loads(MANIFEST.to_bytes())
    document["format"] = 2
    with pytest.raises(DamagedError, match="another format than 1"):
        Manifest.from_bytes(json.dumps(document).encode())


def test_a_wrong_field_is_named() -> None:
    document = json.loads(MANIFEST.to_bytes())
    document["splits"]["train"][1]["num_samples"] = "many"
    with pytest.raises(DamagedError, match=r"Manifest.*splits.train.1.num_samples"):
        Manifest.from_bytes(json.dumps(document).encode())


def test_keys() -> None:
    assert shard_key("d", "ab") == "datasets/d/shards/ab"
    assert manifest_key("d", "ab") == "datasets/d/manifests/ab.json"


def test_a_version_that_does_not_exist_is_the_users_error(store: Store) -> None:
    with pytest.raises(UserError, match="dataset 'd' has no version 000000000000"):
        load_manifest(store, "d", "0" * 64)


def test_a_damaged_manifest_is_refused_by_name(store: Store) -> None:
    key = manifest_key("d", MANIFEST.digest)
    store.put(key, MANIFEST.to_bytes())
    assert load_manifest(store, "d", MANIFEST.digest) == MANIFEST
    store.put(key, MANIFEST.to_bytes().replace(b'"num_samples":3', b'"num_samples":4'))
    with pytest.raises(DamagedError, match=MANIFEST.digest):
        load_manifest(store, "d", MANIFEST.digest)


def test_a_manifest_without_one_of_the_splits_is_refused() -> None:
    document = {**MANIFEST.to_json(), "splits": {"test": []}}
    with pytest.raises(DamagedError, match=r"splits\.train: it is missing"):
        Manifest.from_bytes(canonical_json(document))
