"""Out to other formats and back: the same version to the last bit, and what was tampered with is named."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from training.data.exchange import ABOUT, Format, export, import_folder
from training.data.manifest import SPLITS, FieldInfo, Manifest, ShardInfo, manifest_key, shard_key
from training.data.shard import Column, Ragged, encode_shard
from training.data.versions import versions
from training.data.withdraw import withdraw
from training.documents import fast_digest, sha256_hex
from training.errors import InfrastructureError, UserError
from training.s3.objectstore import Store

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
        image = archive.extractfile("train-00000-0000001.image_int16.npy")
        assert image is not None
        assert np.load(io.BytesIO(image.read())).tolist() == [[1, 2, 3], [4, 0, 1]]
    assert {name.partition(".")[0] for name in names} == {f"train-00000-000000{row}" for row in range(3)}
    table = parquet.read_table(tmp_path / "parquet/train-00000.parquet")
    assert table.schema.field("image_int16").type == pa.list_(pa.int16(), 6)
    assert table.schema.field("image_int16").metadata[b"shape"] == b"[2, 3]"
    assert table.schema.field("pairs").metadata[b"shape"] == b"[null, 2]"
    assert table["scalar_float16"].to_pylist() == [0.0, 1.0, 2.0]
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
@pytest.mark.parametrize("damage", ["missing", "cut", "garbage", "about", "flip"])
def test_what_is_not_as_it_was_is_named(
    store: Store, manifest: Manifest, tmp_path: Path, form: Format, damage: str
) -> None:
    paths = list(export(store, "d", manifest.digest, tmp_path / "out", form=form))
    victim = tmp_path / "out" / ABOUT if damage == "about" else paths[0]
    if damage == "missing":
        victim.unlink()
    elif damage == "flip":
        data = victim.read_bytes()
        where = data.index("ü/train.csv:0#0".encode())
        victim.write_bytes(data[:where] + b"x" + data[where + 1 :])
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
        member = tarfile.TarInfo("x.text.npy")
        member.size = len(file.getvalue())
        archive.addfile(member, io.BytesIO(file.getvalue()))
    with pytest.raises(UserError, match=r"train-00000\.tar.*member 'x\.text\.npy'"):
        import_folder(store, "other", tmp_path / "out")


def test_rows_in_another_order_are_not_taken_for_the_same(store: Store, manifest: Manifest, tmp_path: Path) -> None:
    (first, _) = export(store, "d", manifest.digest, tmp_path / "out", form="parquet")
    parquet.write_table(parquet.read_table(first).take([1, 0, 2]), first)
    with pytest.raises(UserError, match=r"train-00000\.parquet: not as it was exported: its samples do not give shard"):
        import_folder(store, "other", tmp_path / "out")


@pytest.mark.parametrize("elsewhere", ["../train-00000.tar", "/etc/hosts"])
def test_files_elsewhere_are_not_read(store: Store, manifest: Manifest, tmp_path: Path, elsewhere: str) -> None:
    list(export(store, "d", manifest.digest, tmp_path / "out", form="webdataset"))
    about = tmp_path / "out" / ABOUT
    about.write_text(about.read_text().replace("train-00000.tar", elsewhere))
    with pytest.raises(UserError, match="it names files elsewhere"):
        import_folder(store, "other", tmp_path / "out")


def test_a_file_left_out_of_the_list_is_noticed(store: Store, manifest: Manifest, tmp_path: Path) -> None:
    list(export(store, "d", manifest.digest, tmp_path / "out", form="webdataset"))
    about = tmp_path / "out/dataset.json"
    document = json.loads(about.read_text())
    document["files"]["train"].popitem()
    about.write_text(json.dumps(document))
    with pytest.raises(UserError, match=rf"dataset\.json: not as it was exported: .*{manifest.digest[:12]}"):
        import_folder(store, "other", tmp_path / "out")
    assert versions(store, "other") == []


def test_withdrawn_records_do_not_come_back(store: Store, manifest: Manifest, tmp_path: Path) -> None:
    list(export(store, "d", manifest.digest, tmp_path / "out", form="webdataset"))
    withdraw(store, "d", manifest.digest, ["ü/train.csv:1"])
    with pytest.raises(UserError, match=r"record 'ü/train\.csv:1' was withdrawn from dataset 'd'"):
        import_folder(store, "d", tmp_path / "out")
    assert import_folder(store, "other", tmp_path / "out") == manifest


@pytest.mark.parametrize(("form", "field"), [("parquet", "id"), ("webdataset", "a/b")])
def test_a_field_that_the_format_would_hide_is_named(store: Store, tmp_path: Path, form: Format, field: str) -> None:
    made = _one_field(store, field)
    with pytest.raises(UserError, match=f"field '{field}'"):
        list(export(store, "d", made.digest, tmp_path / "out", form=form))
    other: Format = "parquet" if form == "webdataset" else "webdataset"
    list(export(store, "d", made.digest, tmp_path / "out", form=other))
    assert import_folder(store, "other", tmp_path / "out") == made


def test_long_names_and_empty_arrays(store: Store, tmp_path: Path) -> None:
    made = _one_field(store, "ü" * 200, np.zeros((3, 0, 2), dtype=np.float32))
    for form in FORMS:
        list(export(store, "d", made.digest, tmp_path / form, form=form))
        assert import_folder(store, "other", tmp_path / form) == made


def test_rows_without_values_go_by_webdataset_only(store: Store, tmp_path: Path) -> None:
    rows = Ragged.stack([np.zeros((n, 0), dtype=np.float32) for n in (3, 0, 2)])
    made = _one_field(store, "boxes", rows)
    with pytest.raises(UserError, match=r"field 'boxes' has no values.*export as webdataset"):
        list(export(store, "d", made.digest, tmp_path / "parquet", form="parquet"))
    assert not (tmp_path / "parquet").exists()
    list(export(store, "d", made.digest, tmp_path / "tar", form="webdataset"))
    assert import_folder(store, "other", tmp_path / "tar") == made


def test_exports_of_earlier_releases_are_to_be_made_again(store: Store, manifest: Manifest, tmp_path: Path) -> None:
    list(export(store, "d", manifest.digest, tmp_path / "out", form="webdataset"))
    about = tmp_path / "out" / ABOUT
    document = json.loads(about.read_text())
    del document["digest"]
    about.write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"dataset\.json: .*digest: Field required; export the version again"):
        import_folder(store, "other", tmp_path / "out")


def test_a_place_that_cannot_be_written_is_named(store: Store, manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InfrastructureError, match=r"cannot write to .*/file/out: Not a directory"):
        list(export(store, "d", manifest.digest, tmp_path / "file/out", form="parquet"))


def _one_field(store: Store, name: str, column: Column | None = None) -> Manifest:
    column = np.arange(3) if column is None else column
    flat, first = (column.flat, (None,)) if isinstance(column, Ragged) else (column, ())
    infos: dict[Any, tuple[ShardInfo, ...]] = {}
    for split in SPLITS:
        data = encode_shard([f"{split}:{n}#0" for n in range(3)], {name: column})
        info = ShardInfo(sha256=sha256_hex(data), xxh3=fast_digest(data), num_samples=3, num_bytes=len(data))
        store.put(shard_key("d", info.sha256), data)
        infos[split] = (info,)
    made = Manifest(fields={name: FieldInfo(dtype=flat.dtype.name, shape=(*first, *flat.shape[1:]))}, splits=infos)
    store.put(manifest_key("d", made.digest), made.to_bytes())
    return made
