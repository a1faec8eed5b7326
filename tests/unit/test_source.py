"""Where records come from: what is listed, in which order, how it is cut, and what a mistake says."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from tests.unit.data_source import data_config, local_source
from training.config import DataConfig
from training.data.source import (
    Source,
    SourceFile,
    classes_of,
    content_digests,
    content_of,
    open_source,
    partition_fingerprint,
    partitions,
    places,
    read_records,
    remote,
)
from training.data.source.partition import MAX_FILL, cut
from training.errors import UserError
from training.recipe import Record
from training.s3.objectstore import Store


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


def test_a_file_written_anew_is_another_one_although_its_size_and_time_are_the_same(raw: Path) -> None:
    """Unpacked archives and `rsync --times` give such files; the shard stage would be taken for finished."""
    source = local_source(raw.parent, data_config(glob="b.csv"))
    (before,) = source.list_files()
    times = (raw / "b.csv").stat()
    (raw / "b.csv").write_text("c.csv\n")
    os.utime(raw / "b.csv", ns=(times.st_atime_ns, times.st_mtime_ns))
    (after,) = source.list_files()
    assert (after.name, after.num_bytes) == (before.name, before.num_bytes)
    assert after != before
    with pytest.raises(UserError, match=r"b\.csv was changed while it was read"):
        source.require_unchanged(before)


def test_a_single_file_needs_no_glob(raw: Path) -> None:
    config = data_config(source="raw/a/note.txt", glob="*.csv")
    assert all_records(local_source(raw.parent, config), config) == [("note.txt:1", b"a/note.txt")]


def test_an_absolute_path_is_not_looked_for_beside_the_preset(raw: Path) -> None:
    config = data_config(source=str(raw / "b.csv"))
    assert names(local_source(Path("elsewhere"), config)) == ["b.csv"]


def files(names: Iterable[str], num_bytes: int = 100) -> list[SourceFile]:
    return [SourceFile(name=name, num_bytes=num_bytes, changed="") for name in names]


def runs(given: list[SourceFile], partition_bytes: int = 1000) -> list[tuple[str, ...]]:
    return [tuple(file.name for file in run) for run in cut(iter(given), partition_bytes)]


def test_files_are_cut_into_partitions_of_about_a_size() -> None:
    found = runs(files(f"{number:04}" for number in range(3000)))
    assert [name for run in found for name in run] == [f"{number:04}" for number in range(3000)]
    assert 8 <= 3000 / len(found) <= 13
    assert max(map(len, found)) <= MAX_FILL * 10
    assert runs(files("abc", num_bytes=1000)) == [("a",), ("b",), ("c",)], "a large file is a partition"


@given(names=st.sets(st.text("abcdef", min_size=1, max_size=6), min_size=2, max_size=120), data=st.data())
@settings(derandomize=True, max_examples=100)
def test_another_file_changes_the_partition_that_it_falls_into_alone(names: set[str], data: st.DataObject) -> None:
    """Or, if that was cut at its greatest size, those up to the next cut by name."""
    added = data.draw(st.sampled_from(sorted(names)))
    before = set(runs(files(sorted(names - {added})), 800))
    after = set(runs(files(sorted(names)), 800))
    if all(len(run) < MAX_FILL * 8 for run in before | after):
        assert len(before - after) <= 1
        assert len(after - before) <= 2


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


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.csv.gz", b"", r"x\.csv\.gz: damaged gzip data: the file is empty"),
        ("x.csv.bz2", b"BZh9", r"x\.csv\.bz2: of packed lines only \.gz is read"),
        ("x.csv.ZST", b"\x28\xb5", r"x\.csv\.ZST: of packed lines only \.gz is read"),
    ],
)
def test_what_would_be_lines_of_garbage_is_named(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / name).write_bytes(content)
    config = data_config()
    with pytest.raises(UserError, match=says):
        all_records(local_source(tmp_path, config), config)
    config = data_config(format="files")
    assert all_records(local_source(tmp_path, config), config) == [(name, content)]


def test_gz_may_be_written_in_capitals(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/X.CSV.GZ").write_bytes(gzip.compress(b"1\n"))
    config = data_config()
    assert all_records(local_source(tmp_path, config), config) == [("X.CSV.GZ:1", b"1")]


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
        return partition_fingerprint(content_digests(source, partitions(source, config)[0]), encoding=encoding)

    before = fingerprint()
    (raw / "b.csv").touch()
    assert fingerprint() == before
    assert fingerprint("f") != before
    (raw / "b.csv").write_text("other\n")
    assert fingerprint() != before


# ---- formats ---------------------------------------------------------------------------------------------------------


def write_parquet(path: Path, num_rows: int = 2500) -> list[dict[str, Any]]:
    rows = [{"text": f"t{n}", "score": n / 2, "image": bytes([n % 256]), "tags": [n, n + 1]} for n in range(num_rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=700)
    return rows


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


TAR = [("a/1.jpg", b"j1"), ("a/1.cls", b"7"), ("a/2.jpg", b"j2"), ("a/2.seg.png", b"s2"), ("b.cls", b"")]


def read_all(source: Source, config: DataConfig) -> list[Record]:
    parts = partitions(source, config)
    classes = classes_of(parts) if config.format == "folders" else ()
    return [record for part in parts for record in read_records(source, part, config, classes)]


def upload(store: Store, folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            store.put(f"raw/{path.relative_to(folder).as_posix()}", path.read_bytes())


@pytest.mark.parametrize("kind", ["parquet", "webdataset", "folders"])
def test_each_format_gives_the_same_from_disk_and_s3(store: Store, tmp_path: Path, kind: str) -> None:
    config = data_config(format=kind)
    rows = write_parquet(tmp_path / "raw/x.parquet") if kind == "parquet" else []
    if kind == "webdataset":
        write_tar(tmp_path / "raw/x.tar", TAR)
    if kind == "folders":
        for name in ("dog/1.png", "cat/1.png", "cat/deep/2.png", "emu/9.png"):
            (tmp_path / "raw" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "raw" / name).write_bytes(name.encode())
    upload(store, tmp_path / "raw")
    found = read_all(local_source(tmp_path, config), config)
    assert read_all(s3_source(store, config, "raw"), config) == found
    if kind == "parquet":
        assert [record.fields for record in found] == rows
        assert [found[0].id, found[-1].id] == ["x.parquet:1", "x.parquet:2500"]
    elif kind == "webdataset":
        assert [(record.id, dict(record.fields)) for record in found] == [
            ("x.tar:a/1", {"jpg": b"j1", "cls": b"7"}),
            ("x.tar:a/2", {"jpg": b"j2", "seg.png": b"s2"}),
            ("x.tar:b", {"cls": b""}),
        ]
    else:
        labels = [(record.id, record.label) for record in found]
        assert labels == [("cat/1.png", 0), ("cat/deep/2.png", 0), ("dog/1.png", 1), ("emu/9.png", 2)]


def test_a_damaged_header_is_no_end_of_an_archive(tmp_path: Path) -> None:
    path = tmp_path / "raw/x.tar"
    write_tar(path, [(f"{n:03}.txt", b"x") for n in range(50)])
    data = bytearray(path.read_bytes())
    data[20 * 1024 + 3] ^= 1
    path.write_bytes(data)
    config = data_config(format="webdataset")
    with pytest.raises(UserError, match=r"x\.tar: not readable as .* after record '019': a member's header is damaged"):
        read_all(local_source(tmp_path, config), config)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE], ids=["soft", "hard", "fifo"])
def test_a_member_without_bytes_is_named(tmp_path: Path, kind: bytes) -> None:
    write_tar(tmp_path / "raw/x.tar", TAR)
    with tarfile.open(tmp_path / "raw/x.tar", "a") as archive:
        member = tarfile.TarInfo("c.jpg")
        member.type, member.linkname = kind, "a/1.jpg"
        archive.addfile(member)
    config = data_config(format="webdataset")
    with pytest.raises(UserError, match=r"x\.tar: member 'c\.jpg' is a link, or no file"):
        read_all(local_source(tmp_path, config), config)


def test_a_member_whose_name_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    with tarfile.open(tmp_path / "raw/x.tar", "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("é.txt"))
    config = data_config(format="webdataset")
    with pytest.raises(UserError, match=r"x\.tar: member '\\udce9\.txt': its name must be UTF-8"):
        read_all(local_source(tmp_path, config), config)


def test_folders_and_hidden_members_are_no_records(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "raw/x.tar", [("._a.jpg", b"mac"), ("./a.jpg", b"1"), ("./._b.jpg", b"mac"), ("./b.jpg", b"2")]
    )
    with tarfile.open(tmp_path / "raw/x.tar", "a") as archive:
        member = tarfile.TarInfo("./c")
        member.type = tarfile.DIRTYPE
        archive.addfile(member)
    config = data_config(format="webdataset")
    found = read_all(local_source(tmp_path, config), config)
    assert [(record.id, dict(record.fields)) for record in found] == [
        ("x.tar:./a", {"jpg": b"1"}),
        ("x.tar:./b", {"jpg": b"2"}),
    ]


def test_members_of_a_record_must_be_neighbours(tmp_path: Path) -> None:
    write_tar(tmp_path / "raw/x.tar", [("a.txt", b"1"), ("b.txt", b"2"), ("a.cls", b"3")])
    config = data_config(format="webdataset")
    with pytest.raises(UserError, match=r"x\.tar: the members of record 'a' are not neighbours"):
        read_all(local_source(tmp_path, config), config)


def test_links_are_followed_and_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    (raw / "dog").mkdir(parents=True)
    (raw / "dog/1.png").touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/2.png").touch()
    (raw / "cat").symlink_to(tmp_path / "elsewhere")
    config = data_config(format="folders")
    assert [file.name for file in local_source(tmp_path, config).list_files()] == ["cat/2.png", "dog/1.png"]
    (raw / "cat/loop").symlink_to(raw)
    with pytest.raises(UserError, match=r"cat/loop leads back to .*raw"):
        list(local_source(tmp_path, config).list_files())
    (raw / "cat/loop").unlink()
    (raw / "dog/gone.png").symlink_to(raw / "nowhere")
    with pytest.raises(UserError, match=r"cannot read .*dog/gone\.png"):
        list(local_source(tmp_path, config).list_files())


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["x", "x"])
    parquet.write_table(table, tmp_path / "raw/x.parquet")
    config = data_config(format="parquet")
    with pytest.raises(UserError, match=r"x\.parquet: two columns have the name 'x'"):
        read_all(local_source(tmp_path, config), config)


def test_a_page_that_is_not_what_its_checksum_says_is_named(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    path = tmp_path / "raw/x.parquet"
    plain: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    parquet.write_table(pa.table({"x": np.arange(300) + 0.5}), path, **plain)
    data = bytearray(path.read_bytes())
    data[data.index(np.float64(100.5).tobytes())] ^= 1
    path.write_bytes(data)
    config = data_config(format="parquet")
    with pytest.raises(UserError, match=r"x\.parquet: not readable as data\.format = 'parquet' after row 0: .*CRC"):
        read_all(local_source(tmp_path, config), config)


@pytest.mark.parametrize(("kind", "where"), [("parquet", "after row 0"), ("webdataset", "at all")])
def test_another_file_among_them_is_named_with_the_key_that_leaves_it_out(
    tmp_path: Path, kind: str, where: str
) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/_SUCCESS").touch()
    config = data_config(format=kind)
    said = rf"_SUCCESS: not readable as data\.format = '{kind}' {where}: .* \(data\.glob says which files count\)"
    with pytest.raises(UserError, match=said):
        read_all(local_source(tmp_path, config), config)


def test_values_that_python_does_not_know_are_named(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    far = pa.array([0, 2**59], pa.int64()).cast(pa.timestamp("ms"))
    parquet.write_table(pa.table({"when": far}), tmp_path / "raw/x.parquet")
    config = data_config(format="parquet")
    with pytest.raises(UserError, match=r"x\.parquet: not readable as data\.format = 'parquet' after row 0"):
        read_all(local_source(tmp_path, config), config)


def test_a_file_without_a_folder_has_no_label(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/stray.png").touch()
    config = data_config(format="folders")
    with pytest.raises(UserError, match=r"stray\.png: data\.format = 'folders' needs every file in a folder"):
        read_all(local_source(tmp_path, config), config)


@pytest.mark.parametrize(
    ("kind", "complaint"),
    [
        ("parquet", r"x: not readable as data.format = 'parquet' after row \d+"),
        ("webdataset", "x: not readable as data.format = 'web"),
    ],
)
@pytest.mark.parametrize("damage", ["cut", "cut between members", "head", "empty", "packed head", "extra's length"])
def test_damaged_files_are_named(tmp_path: Path, kind: str, complaint: str, damage: str) -> None:
    path = tmp_path / "raw/x"
    if kind == "parquet":
        write_parquet(path)
    else:
        write_tar(path, [(f"{number}.bin", bytes(2000)) for number in range(9)])
    good = path.read_bytes()
    damaged = {
        "cut": good[: len(good) * 2 // 3 + 300],
        "cut between members": good[: 5 * 2560],
        "head": b"\xff" * 600 + good[600:],
        "empty": b"",
        "packed head": b"\x1f\x8b\x08",
        "extra's length": extended_tar(b"9" * 30 + b" path=a\n"),
    }
    path.write_bytes(damaged[damage])
    config = data_config(format=kind)
    with pytest.raises(UserError, match=complaint):
        read_all(local_source(tmp_path, config), config)


def extended_tar(header: bytes) -> bytes:
    """Whose first member has this PAX header."""
    extra = tarfile.TarInfo("x")
    extra.type, extra.size = tarfile.XHDTYPE, len(header)
    member = tarfile.TarInfo("1.bin")
    return extra.tobuf(tarfile.USTAR_FORMAT) + header.ljust(512, b"\0") + member.tobuf() + bytes(1024)


def test_a_member_that_comes_twice_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "raw/x.tar", [("1.jpg", b"a"), ("1.JPG", b"b")])
    config = data_config(format="webdataset")
    with pytest.raises(UserError, match=r"x\.tar: member '1\.jpg' comes twice"):
        read_all(local_source(tmp_path, config), config)


def test_an_object_replaced_while_it_is_read_is_named(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PIECE_BYTES", 1000)
    monkeypatch.setattr(places, "BLOCK_BYTES", 100)
    lines = b"".join(b"%d\n" % number for number in range(1000))
    store.put("raw/x.csv", lines)
    config = data_config()
    source = s3_source(store, config, "raw")
    records = read_records(source, partitions(source, config)[0], config)
    next(records)
    store.put("raw/x.csv", lines[::-1])
    with pytest.raises(UserError, match=r"raw/x\.csv was replaced while it was read"):
        list(records)


def test_what_decides_the_split_of_a_record_with_fields_is_their_content() -> None:
    fields = {"image": b"\x00\xff", "n": 3, "x": 0.1, "tags": ["a", {"b": b"c"}], "none": None}
    same = Record(id="another", data=b"", fields=dict(reversed(fields.items())))
    assert content_of(Record(id="x", data=b"", fields=fields)) == content_of(same)
    assert len({content_of(Record(id="x", data=b"", fields={**fields, "n": n})) for n in (3, "3", 3.0, None)}) == 4


STREAM = """
import resource, sys
from training.config import DataConfig
from training.data.source import open_source, partitions, read_records
from training.s3.objectstore import StoreLocation

config = DataConfig(name="x", source=sys.argv[1], format=sys.argv[2])
location = StoreLocation(endpoint=sys.argv[3], bucket="unused")
source = open_source(config, folder="", location=location)
before = None
for number, record in enumerate(read_records(source, partitions(source, config)[0], config)):
    if number == 100:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, number + 1)
"""


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "webdataset"])
def test_memory_is_bounded_whatever_the_size(store: Store, tmp_path: Path, kind: str) -> None:
    """128 MB from S3 in at most 40 MB more than after the first hundred records."""
    path = tmp_path / "big"
    if kind == "jsonl":
        path.write_bytes((b"x" * 65_535 + b"\n") * 2000)
    elif kind == "webdataset":
        write_tar(path, [(f"{number}.bin", bytes(64_000)) for number in range(2000)])
    else:
        random = np.random.default_rng(1)
        schema = pa.schema([("x", pa.binary())])
        with parquet.ParquetWriter(path, schema) as writer:
            for _ in range(50):
                writer.write_table(pa.table({"x": [random.bytes(64_000) for _ in range(40)]}, schema=schema))
    store.put("big", path.read_bytes())
    command = [sys.executable, "-c", STREAM, store.location.uri("big"), kind, str(store.location.endpoint)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    growth_mib, num_records = map(int, done.stdout.split())
    assert num_records == 2000
    assert growth_mib < 40


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
    prints = [[content_digests(s, part) for part in partitions(s, config)] for s in sources]
    assert records[0] == records[1]
    assert prints[0] == prints[1]
