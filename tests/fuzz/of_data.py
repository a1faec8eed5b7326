"""The parsers of `training.data`: datasets' documents, shards, sources to be sharded, and exported folders."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from tests.fuzz.of_training import head_of
from tests.fuzz.parser import DIGEST, Held, MemoryFile, Parser
from training.data.activity import Activity, read_activity
from training.data.collect import _names_none_of, _shards_of
from training.data.exchange import About, _about, _array_of, _read_parquet, _read_tar, to_arrow
from training.data.finished import Finished, Receipt
from training.data.manifest import SPLITS, FieldInfo, Manifest, ShardInfo, load_manifest
from training.data.shard import Ragged, Shard, decode_shard, encode_shard
from training.data.source.places import SourceFile
from training.data.source.records import READERS
from training.data.withdrawn import contents_of, quarantined_records, withdrawn_records
from training.documents import canonical_json, parse, sealed, unsealed

IMPORT_ERRORS = (Exception,)
"""An import names its file, whatever that brings about."""
SHARD_INFO = ShardInfo(sha256=DIGEST, xxh3=DIGEST[:32], num_samples=3, num_bytes=900)
FIELDS = {"image": FieldInfo(dtype="uint8", shape=(8, 8)), "text": FieldInfo(dtype="int32", shape=(None,))}
MANIFEST = Manifest(
    fields=FIELDS,
    splits={"train": (SHARD_INFO, SHARD_INFO), "test": (SHARD_INFO,)},
    classes=("cat", "dog"),
)
RECEIPT = Receipt(fields=FIELDS, splits=dict.fromkeys(SPLITS, (SHARD_INFO,)), displaced=("a:1",))
ACTIVITY = Activity(holders={"writer-a-1-host": 1.8e9}, newest=DIGEST, generation=3, version=2)
WITHDRAWN = {"format": 1, "version": 1, "ids": {"a:1": {"time": "now", "reason": "quarantined: b", "contents": ["c"]}}}
COLUMNS = {"label": np.arange(3), "text": Ragged.stack([np.arange(n, dtype=np.int32) for n in (1, 0, 2)])}
SHARD = encode_shard(["a#0", "b#0", "ü#0"], COLUMNS)
BODY = SHARD[8 + len(head_of(SHARD)) :]
ABOUT = About(format="parquet", fields=FIELDS, files={split: {"a.parquet": DIGEST} for split in SPLITS}, digest=DIGEST)
LINES = "jsonl"
FILE = MemoryFile()


def archive(mode: str, *members: tuple[str, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode, format=form) as tar:  # type: ignore[call-overload]  # a text is one of its literals
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


def unpadded(data: bytes) -> bytes:
    """With its end mark alone: what is changed shall be something."""
    content = data.rstrip(b"\0")
    return content + bytes(-len(content) % 512 + 1024)


def npy(array: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def table() -> bytes:
    out = io.BytesIO()
    parquet.write_table(pa.table({"a": [1, 2, 3], "b": ["x", "y", None], "c": [[1.0], [], [2.0]]}), out)
    return out.getvalue()


def exported_table() -> bytes:
    out = io.BytesIO()
    arrays = [pa.array(["a", "b", "c"]), to_arrow(np.zeros((3, 8, 8), np.uint8)), to_arrow(COLUMNS["text"])]
    parquet.write_table(pa.Table.from_arrays(arrays, names=["id", *FIELDS]), out)
    return out.getvalue()


MEMBERS = (("a.png", b"12345"), ("a.json", b"12345"), ("b" * 120 + ".json", b"12345"))
ARCHIVES = tuple(unpadded(archive("w", *MEMBERS, form=form)) for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))
EXPORTED = tuple(
    item
    for key in ("a-0",)
    for item in (
        (f"{key}.id", key.encode()),
        (f"{key}.image.npy", npy(np.zeros((8, 8), np.uint8))),
        (f"{key}.text.npy", npy(np.arange(3, dtype=np.int32))),
    )
)
EXPORT = unpadded(archive("w", *EXPORTED))
TAR_WORDS = (
    *(b"ustar\x0000", b"ustar  \x00", b"77777777777\x00", b"\x80" + b"\xff" * 11, b"..", b"/", b"\x80"),
    *(b"\x00" * 512, b"g", b"x", b"L", b"K", b"S", b"1", b"2", b"30 path=a.b\n", b"21 GNU.sparse.map=0,1\n"),
    *(b"11 size=-1\n", b"19 size=99999999999\n", b"22 GNU.sparse.major=1\n"),
)
NPY_WORDS = (
    *(b"True", b"'descr': '|O'", b"'<f8'", b"'fortran_order': True", b"(2, 3)", b"(-1,)", b"(99999999999,)"),
    *(b"()", b"\x02\x00", b"\x03\x00", b"[('a', '<f8')]", b"'|S9'", b"'<M8[s]'", b"(" * 900, b"'|V0'"),
    *(b"'V9999999999'",),
)


def parsers() -> list[Parser]:
    return [
        Parser(name="a dataset manifest", seeds=(MANIFEST.to_bytes(),), parse=a_manifest),
        Parser(name="a dataset's activity", seeds=(canonical_json(asdict(ACTIVITY)),), parse=an_activity),
        Parser(name="withdrawn records", seeds=(canonical_json(WITHDRAWN),), parse=withdrawn),
        Parser(name="a sealed receipt", seeds=(sealed("receipt", asdict(RECEIPT)),), parse=a_receipt, proves=True),
        Parser(name="a receipt", seeds=(canonical_json(asdict(RECEIPT)),), wrap=a_seal("receipt"), parse=a_receipt),
        Parser(name="a receipt, as garbage is collected", seeds=(sealed("receipt", asdict(RECEIPT)),), parse=needed,
               refuses=False),
        Parser(name="a shard", seeds=(SHARD,), parse=a_shard),
        Parser(name="the head of a shard", seeds=(head_of(SHARD),), wrap=with_body, parse=a_shard),
        Parser(name="an array of an import", seeds=(npy(np.arange(6, dtype=np.float32).reshape(2, 3)),), parse=an_array,
               words=NPY_WORDS, errors=IMPORT_ERRORS),
        Parser(name="an exported archive", seeds=(EXPORT,), wrap=with_sums, parse=an_exported_archive,
               words=(*TAR_WORDS, *NPY_WORDS), errors=IMPORT_ERRORS),
        Parser(name="an exported table", seeds=(exported_table(),), parse=an_exported_table, errors=IMPORT_ERRORS),
        Parser(name="what an export leaves", seeds=(json.dumps(asdict(ABOUT)).encode(),), parse=about),
        Parser(name="lines", seeds=(b'{"a": 1}\n{"a": 2}\r\n\n{"a": 3}',), parse=reader("jsonl"), refuses=False),
        Parser(name="packed lines", seeds=(gzip.compress(b'{"a": 1}\n' * 50, mtime=0),), parse=reader("jsonl", "x.gz")),
        Parser(name="packed lines of anything", seeds=(b'{"a": 1}\n' * 3,), wrap=packed, parse=reader("jsonl", "x.gz"),
               refuses=False),
        Parser(name="an archive", seeds=ARCHIVES, wrap=with_sums, parse=reader("webdataset"), words=TAR_WORDS),
        Parser(name="a packed archive", seeds=(archive("w:gz", *MEMBERS), archive("w:xz", *MEMBERS),
               archive("w:bz2", *MEMBERS)), parse=reader("webdataset")),
        # Arrow takes what a page says that it will be (31 bits): docs/security.md
        Parser(name="a table", seeds=(table(),), parse=reader("parquet"), most_kilobytes=3 << 20),
    ]  # fmt: skip


def a_manifest(data: bytes) -> Any:
    manifest = load_manifest(Held({".json": data}), "d", DIGEST)
    return manifest.digest, [(manifest.num_samples(split), manifest.shard_sizes(split)) for split in SPLITS]


def an_activity(data: bytes) -> Any:
    return read_activity(Held({"activity.json": data}), "d")


def withdrawn(data: bytes) -> Any:
    store = Held({"withdrawn.json": data})
    return contents_of(withdrawn_records(store, "d")), quarantined_records(store, "d")


def a_seal(name: str) -> Callable[[bytes], bytes]:
    """Around a document whose digest is right, whatever it says."""

    def wrap(data: bytes) -> bytes:
        try:
            return sealed(name, json.loads(data))
        except (ValueError, RecursionError):
            return data

    return wrap


def a_receipt(data: bytes) -> Any:
    """As a writer looks whether it must do a partition again."""
    store = Held({"x": data, DIGEST: SHARD})
    Finished(store, "d", withdrawn_contents=()).maybe_receipt("x")
    return parse(Receipt, unsealed("receipt", data))


def needed(data: bytes) -> Any:
    store = Held({"x": data})
    return _shards_of(store, "d", "x"), _names_none_of(store, "x", [DIGEST])


def a_shard(data: bytes) -> Any:
    shard: Shard = decode_shard(data, name="s")
    assert all(len(column) == len(shard) for column in shard.columns.values())
    return list(shard.columns)


def with_body(head: bytes) -> bytes:
    return len(head).to_bytes(8, "little") + head + BODY


def with_sums(data: bytes) -> bytes:
    """Each block of a tar archive that looks like a member's head, with its checksum."""
    made = bytearray(data)
    for start in range(0, len(made) - 511, 512):
        if made[start + 257 : start + 262] == b"ustar":
            made[start + 148 : start + 156] = b" " * 8
            made[start + 148 : start + 156] = b"%06o\0 " % sum(made[start : start + 512])
    return bytes(made)


def packed(data: bytes) -> bytes:
    return gzip.compress(data, compresslevel=1, mtime=0)


def an_array(data: bytes) -> Any:
    return _array_of(data).shape


def an_exported_archive(data: bytes) -> Any:
    return len(_read_tar(FILE.holding(data), FIELDS)[0])


def an_exported_table(data: bytes) -> Any:
    ids, columns = _read_parquet(FILE.holding(data), FIELDS)
    return len(encode_shard(ids, columns))


def about(data: bytes) -> Any:
    folder = FolderOf(data)
    return _about(folder)  # type: ignore[arg-type]  # of a folder, what is used


class FolderOf:
    """A folder with this file."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def __truediv__(self, name: str) -> Path:
        return FILE.holding(self._data)


def reader(form: str, name: str = "x") -> Callable[[bytes], int]:
    def read(data: bytes) -> int:
        file = SourceFile(name=name, num_bytes=len(data), changed="")
        return sum(1 for _ in READERS[form](file, io.BytesIO(data)))

    return read
