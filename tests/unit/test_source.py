"""Where records come from: what is listed, in which order, how it is cut, and what a mistake says."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.data_source import data_config, local_source
from training.config import DataConfig
from training.data.source import Source, open_source, partition_fingerprint, partitions, read_records
from training.errors import UserError
from training.objectstore import Store


def names(source: Source) -> list[str]:
    return [file.name for file in source.list_files()]


def all_records(source: Source, config: DataConfig) -> list[tuple[str, bytes]]:
    return [(r.id, r.data) for part in partitions(source, config) for r in read_records(source, part, config)]


def s3_source(store: Store, config: DataConfig, under: str) -> Source:
    return open_source(
        replace(config, source=store.location.uri(under)), folder="", location=replace(store.location, prefix="")
    )


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    for name in ("b.csv", "a/10.csv", "a/2.csv", "a.csv", ".hidden.csv", ".git/x.csv", "skip/x.csv", "a/note.txt"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name}\n")
    return folder


def test_a_folder_is_listed_in_the_order_of_names_without_what_is_hidden_or_excluded(raw: Path) -> None:
    config = data_config(glob="*.csv", exclude=("skip",))
    assert names(local_source(raw.parent, config)) == ["a.csv", "a/10.csv", "a/2.csv", "b.csv"]


def test_a_single_file_needs_no_glob(raw: Path) -> None:
    config = data_config(source="raw/a/note.txt", glob="*.csv")
    assert all_records(local_source(raw.parent, config), config) == [("note.txt:1", b"a/note.txt")]


def test_an_absolute_path_is_not_looked_for_beside_the_preset(raw: Path) -> None:
    config = data_config(source=str(raw / "b.csv"))
    assert names(local_source(Path("elsewhere"), config)) == ["b.csv"]


def test_files_are_cut_into_partitions_of_about_a_size(tmp_path: Path) -> None:
    for number, size in enumerate((600, 400, 100, 5000, 10, 1014, 1)):
        path = tmp_path / "raw" / str(number)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x" * size)
    config = data_config(format="files")
    parts = partitions(local_source(tmp_path, config), config)
    assert [[file.name for file in part.files] for part in parts] == [["0", "1"], ["2"], ["3"], ["4", "5"], ["6"]]


def test_lines_are_records_whatever_ends_them(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/x.jsonl").write_bytes(b'{"a":1}\n\r\n\n{"a":2}\r\n{"a":3}')
    config = data_config(format="jsonl")
    assert all_records(local_source(tmp_path, config), config) == [
        ("x.jsonl:1", b'{"a":1}'),
        ("x.jsonl:4", b'{"a":2}'),
        ("x.jsonl:5", b'{"a":3}'),
    ]


def test_gz_is_unpacked_for_lines_and_left_for_files(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    packed = gzip.compress(b"1\n2\n")
    (tmp_path / "raw/x.csv.gz").write_bytes(packed)
    for kind, expected in (("csv", [("x.csv.gz:1", b"1"), ("x.csv.gz:2", b"2")]), ("files", [("x.csv.gz", packed)])):
        config = data_config(format=kind)
        assert all_records(local_source(tmp_path, config), config) == expected


@pytest.mark.parametrize("damage", ["cut", "flip", "header", "block", "checksum"])
def test_damaged_gz_is_the_users_error_and_names_the_file(tmp_path: Path, damage: str) -> None:
    text = "".join(f"{number * 7919 % 10007}\n" for number in range(2000)).encode()
    packed = bytearray(gzip.compress(text))
    if damage == "cut":
        del packed[len(packed) // 2 :]
    else:
        position = {"flip": len(packed) // 2, "header": 0, "block": 10, "checksum": len(packed) - 8}[damage]
        packed[position] ^= 0xFF
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/x.csv.gz").write_bytes(packed)
    config = data_config()
    with pytest.raises(UserError, match=r"x\.csv\.gz: damaged gzip data after line \d+"):
        all_records(local_source(tmp_path, config), config)


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"data.source = 'raw': {tmp_path}/raw does not exist"):
        local_source(tmp_path, data_config())


@pytest.mark.parametrize("glob", ["*", "*.parquet"])
def test_an_empty_source_is_named(tmp_path: Path, glob: str) -> None:
    (tmp_path / "raw").mkdir()
    config = data_config(glob=glob)
    with pytest.raises(UserError, match=r"data\.source = 'raw' holds no file that matches data\.glob"):
        partitions(local_source(tmp_path, config), config)


def test_an_unknown_package_is_named() -> None:
    config = data_config(source="package://no_such_package/data.csv")
    with pytest.raises(UserError, match="no installed package 'no_such_package'"):
        local_source(Path(), config)


def test_packages_and_the_standard_library_are_sources() -> None:
    package = data_config(source="package://numpy/__init__.py", format="files")
    assert names(local_source(Path(), package)) == ["__init__.py"]
    stdlib = data_config(source="stdlib://json", format="files", glob="*.py")
    assert "decoder.py" in names(local_source(Path(), stdlib))


def test_the_fingerprint_is_of_the_bytes_and_the_encoding_alone(raw: Path) -> None:
    config = data_config(glob="b.csv")
    source = local_source(raw.parent, config)

    def fingerprint(encoding: str = "e") -> str:
        return partition_fingerprint(source, partitions(source, config)[0], encoding=encoding)

    before = fingerprint()
    (raw / "b.csv").touch()
    assert fingerprint() == before
    assert fingerprint("f") != before
    (raw / "b.csv").write_text("other\n")
    assert fingerprint() != before


# ---- S3 --------------------------------------------------------------------------------------------------------------


def test_objects_below_a_prefix_are_read_and_longer_neighbours_are_not(store: Store) -> None:
    for key in ("raw/b.csv", "raw/a/1.csv", "raw-old/x.csv", "raw.csv", "rawer/y.csv", "raw/.hidden", "raw/sub/"):
        store.put(key, f"{key}\n".encode())
    config = data_config()
    expected = [("a/1.csv:1", b"raw/a/1.csv"), ("b.csv:1", b"raw/b.csv")]
    for under in ("raw", "raw/"):
        assert all_records(s3_source(store, config, under), config) == expected


def test_one_object_is_a_source(store: Store) -> None:
    store.put("raw/b.csv", b"1\n2\n")
    store.put("raw/b.csv.bak", b"3\n")
    config = data_config()
    assert all_records(s3_source(store, config, "raw/b.csv"), config) == [("b.csv:1", b"1"), ("b.csv:2", b"2")]


def test_a_folder_marker_is_no_record(store: Store) -> None:
    """Consoles make an empty object `raw/` for a new folder."""
    store.put("raw/", b"")
    store.put("raw/a.bin", b"a")
    config = data_config(format="files")
    for under in ("raw", "raw/"):
        assert all_records(s3_source(store, config, under), config) == [("a.bin", b"a")]


def test_a_file_named_like_its_folder_is_read(store: Store) -> None:
    store.put("raw/raw", b"a")
    config = data_config(format="files")
    assert all_records(s3_source(store, config, "raw"), config) == [("raw", b"a")]


def test_an_empty_prefix_is_named(store: Store) -> None:
    config = replace(data_config(), source=store.location.uri("none"))
    with pytest.raises(UserError, match=r"data.source = 's3://.*none' holds no file"):
        partitions(s3_source(store, config, "none"), config)


def test_disk_and_s3_give_the_same_records_and_fingerprints(store: Store, raw: Path) -> None:
    config = data_config(exclude=("skip",), glob="*.csv")
    for path in raw.rglob("*"):
        if path.is_file():
            store.put(f"raw/{path.relative_to(raw).as_posix()}", path.read_bytes())
    sources = [local_source(raw.parent, config), s3_source(store, config, "raw")]
    records = [all_records(source, config) for source in sources]
    prints = [[partition_fingerprint(s, part, encoding="e") for part in partitions(s, config)] for s in sources]
    assert records[0] == records[1]
    assert prints[0] == prints[1]
