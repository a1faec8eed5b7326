"""Out to other formats and back: the same version to the last bit, and what was tampered with is named."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet

from training.data.exchange import ABOUT, Format, export, import_folder
from training.data.manifest import FieldInfo, Manifest, ShardInfo, manifest_key, shard_key
from training.data.shard import Column, Ragged, encode_shard
from training.documents import fast_digest, sha256_hex
from training.errors import UserError
from training.objectstore import Store

FORMS: tuple[Format, ...] = ("webdataset", "parquet")
DTYPES = ("uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64", "bool")


@pytest.fixture
def manifest(store: Store) -> Manifest:
    """Every dtype as a scalar, an image, and rows of different length; ids of any text."""
    fields: dict[str, FieldInfo] = {}
    splits: dict[Any, tuple[ShardInfo, ...]] = {}
    for split, count in (("train", 3), ("test", 2)):
        columns: dict[str, Column] = {}
        for dtype in DTYPES:
            columns[f"scalar_{dtype}"] = np.arange(count).astype(dtype)
            columns[f"image_{dtype}"] = (np.arange(count * 6) % 5).reshape(count, 2, 3).astype(dtype)
        columns["text"] = Ragged.stack([np.arange(n, dtype=np.uint8) for n in (3, 0, 2)[:count]])
        columns["pairs"] = Ragged.stack([np.ones((n, 2), dtype=np.float32) for n in (1, 2, 0)[:count]])
        for name, column in columns.items():
            flat = column.flat if isinstance(column, Ragged) else column
            first = (None,) if isinstance(column, Ragged) else ()
            fields[name] = FieldInfo(dtype=flat.dtype.name, shape=(*first, *flat.shape[1:]))
        data = encode_shard([f"ü/{split}.csv:{n}#0" for n in range(count)], columns)
        info = ShardInfo(sha256=sha256_hex(data), xxh3=fast_digest(data), num_samples=count, num_bytes=len(data))
        store.put(shard_key("d", info.sha256), data)
        splits[split] = (info,)
    made = Manifest(fields=fields, splits=splits, classes=("cat", "dog"))
    store.put(manifest_key("d", made.digest), made.to_bytes())
    return made


@pytest.mark.parametrize("form", FORMS)
def test_there_and_back_is_the_same_version(store: Store, manifest: Manifest, tmp_path: Path, form: Format) -> None:
    written = list(export(store, "d", manifest.digest, tmp_path / "out", form=form))
    assert len(written) == 2
    assert import_folder(store, "other", tmp_path / "out") == manifest
    assert store.get(shard_key("other", manifest.splits["train"][0].sha256))


def test_others_read_the_archives_and_the_tables(store: Store, manifest: Manifest, tmp_path: Path) -> None:
    for form in FORMS:
        list(export(store, "d", manifest.digest, tmp_path / form, form=form))
    with tarfile.open(tmp_path / "webdataset/train-00000.tar") as archive:
        names = archive.getnames()
        image = archive.extractfile("000000001.image_int16.npy")
        assert image is not None
        assert np.load(io.BytesIO(image.read())).tolist() == [[1, 2, 3], [4, 0, 1]]
    assert all(name.count("/") == 0 and name.split(".")[0].isdigit() for name in names)
    table = parquet.read_table(tmp_path / "parquet/train-00000.parquet")
    assert table["id"].to_pylist()[0] == "ü/train.csv:0#0"
    assert table["text"].to_pylist() == [[0, 1, 2], [], [0, 1]]


def test_exports_are_the_same_bytes_each_time(store: Store, manifest: Manifest, tmp_path: Path) -> None:
    for name in ("a", "b"):
        list(export(store, "d", manifest.digest, tmp_path / name, form="webdataset"))
    assert (tmp_path / "a/train-00000.tar").read_bytes() == (tmp_path / "b/train-00000.tar").read_bytes()


def test_a_folder_in_use_is_refused(store: Store, manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    with pytest.raises(UserError, match="is not empty"):
        list(export(store, "d", manifest.digest, tmp_path, form="parquet"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("damage", ["missing", "cut", "garbage", "about"])
def test_what_is_not_as_it_was_is_named(
    store: Store, manifest: Manifest, tmp_path: Path, form: Format, damage: str
) -> None:
    paths = list(export(store, "d", manifest.digest, tmp_path / "out", form=form))
    victim = tmp_path / "out" / ABOUT if damage == "about" else paths[0]
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[:1500] if damage == "cut" else b"garbage")
    with pytest.raises(UserError, match=victim.name):
        import_folder(store, "other", tmp_path / "out")
    assert not list(store.list_keys("datasets/other/manifests/"))


def test_a_pickle_is_not_loaded(store: Store, manifest: Manifest, tmp_path: Path) -> None:
    (first, _) = export(store, "d", manifest.digest, tmp_path / "out", form="webdataset")
    file = io.BytesIO()
    np.save(file, np.array([{"run": "me"}], dtype=object), allow_pickle=True)
    with tarfile.open(first, "w") as archive:
        member = tarfile.TarInfo("000000000.text.npy")
        member.size = len(file.getvalue())
        archive.addfile(member, io.BytesIO(file.getvalue()))
    with pytest.raises(UserError, match=r"train-00000\.tar.*allow_pickle"):
        import_folder(store, "other", tmp_path / "out")
