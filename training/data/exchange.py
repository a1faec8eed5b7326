"""Interchange: a dataset version as WebDataset archives or Parquet files, and back, so that nobody is locked in.

One file per shard, `train-00000.tar`. Coming back, each file is a shard again: the same version, to the last bit.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from training.data.lease import writing
from training.data.manifest import (
    SPLITS,
    FieldInfo,
    Manifest,
    ShardInfo,
    Split,
    load_manifest,
    manifest_key,
    shard_key,
)
from training.data.shard import Array, Column, Ragged, Shard, decode_shard, encode_shard
from training.documents import fast_digest, parse, sha256_hex
from training.errors import DamagedError, UserError
from training.objectstore import Store

Format = Literal["webdataset", "parquet"]
ABOUT = "dataset.json"
"""Beside the files: what neither format can say (fields, classes, which file belongs to which split)."""


@dataclass(frozen=True, kw_only=True)
class About:
    """The document beside the files."""

    format: Format
    fields: dict[str, FieldInfo]
    files: dict[Split, tuple[str, ...]]
    classes: tuple[str, ...] = ()


def export(store: Store, dataset: str, digest: str, folder: Path, *, form: Format) -> Iterator[Path]:
    """Write a version's files into an empty or new folder; gives each when it is written."""
    manifest = load_manifest(store, dataset, digest)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: name a new folder")
    write, suffix = (_write_tar, "tar") if form == "webdataset" else (_write_parquet, "parquet")
    files: dict[Split, tuple[str, ...]] = {}
    for split in SPLITS:
        files[split] = tuple(f"{split}-{n:05}.{suffix}" for n in range(len(manifest.splits[split])))
        for info, name in zip(manifest.splits[split], files[split], strict=True):
            data = store.get_proven(shard_key(dataset, info.sha256), sha256=info.sha256)
            write(folder / name, decode_shard(data, name=info.sha256))
            yield folder / name
    about = {"format": form, "fields": manifest.to_json()["fields"], "files": files, "classes": manifest.classes}
    (folder / ABOUT).write_text(json.dumps(about, indent=1) + "\n")


def import_folder(store: Store, dataset: str, folder: Path) -> Manifest:
    """Make a version of the files that `export` wrote. Raises `UserError` naming the file that is not as it was."""
    about = _about(folder)
    read = _read_tar if about.format == "webdataset" else _read_parquet
    splits: dict[Split, tuple[ShardInfo, ...]] = {}
    with writing(store, dataset) as lease:
        for split in SPLITS:
            splits[split] = tuple(_send(store, dataset, folder / name, about, read) for name in about.files[split])
        manifest = Manifest(fields=about.fields, splits=splits, classes=about.classes)
        lease.require_sure()
        store.put_immutable(manifest_key(dataset, manifest.digest), manifest.to_bytes())
    return manifest


Read = Callable[[Path, Mapping[str, FieldInfo]], tuple[list[str], dict[str, Column]]]


def _send(store: Store, dataset: str, path: Path, about: About, read: Read) -> ShardInfo:
    try:
        ids, columns = read(path, about.fields)
        data = encode_shard(ids, columns)
    except (OSError, ValueError, KeyError, EOFError, tarfile.TarError) as error:
        raise UserError(f"{path}: not as it was exported: {type(error).__name__}: {error}") from error
    info = ShardInfo(sha256=sha256_hex(data), xxh3=fast_digest(data), num_samples=len(ids), num_bytes=len(data))
    store.put_immutable(shard_key(dataset, info.sha256), data)
    return info


def _about(folder: Path) -> About:
    path = folder / ABOUT
    try:
        return parse(About, json.loads(path.read_text()))
    except (OSError, ValueError, DamagedError) as error:
        raise UserError(f"{path}: not what an export leaves there: {error}") from error


def _is_ragged(info: FieldInfo) -> bool:
    return info.shape[:1] == (None,)


def _column(rows: list[Array], info: FieldInfo) -> Column:
    dtype = np.dtype(info.dtype)
    rows = [np.asarray(row, dtype=dtype) for row in rows]
    return Ragged.stack(rows) if _is_ragged(info) else np.stack(rows)


# ---- WebDataset ------------------------------------------------------------------------------------------------------


def _write_tar(path: Path, shard: Shard) -> None:
    """A sample is KEY.id (its id) and KEY.FIELD.npy; the key is its row, since a key may have no dot."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for row in range(len(shard)):
            _add(archive, f"{row:09}.id", shard.id_of(row).encode())
            for name, column in sorted(shard.columns.items()):
                file = io.BytesIO()
                np.save(file, column[row], allow_pickle=False)
                _add(archive, f"{row:09}.{name}.npy", file.getvalue())


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # no time, no owner: the same bytes each time
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def _read_tar(path: Path, fields: Mapping[str, FieldInfo]) -> tuple[list[str], dict[str, Column]]:
    ids: list[str] = []
    rows: dict[str, list[Array]] = {name: [] for name in fields}
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            _, _, extension = member.name.partition(".")
            content = archive.extractfile(member)
            if content is None:
                raise ValueError(f"member {member.name!r} is no file")
            if extension == "id":
                ids.append(content.read().decode())
            else:
                rows[extension.removesuffix(".npy")].append(np.load(io.BytesIO(content.read()), allow_pickle=False))
    if any(len(found) != len(ids) for found in rows.values()):
        raise ValueError("some samples lack a field")
    return ids, {name: _column(rows[name], info) for name, info in fields.items()}


# ---- Parquet ---------------------------------------------------------------------------------------------------------


def _write_parquet(path: Path, shard: Shard) -> None:
    """A column `id`, and one per field: scalars as they are, arrays as lists, flat (`dataset.json` has the shapes)."""
    import pyarrow as pa
    from pyarrow import parquet

    columns: dict[str, Any] = {"id": pa.array(shard.ids, pa.string())}
    for name, column in sorted(shard.columns.items()):
        flat = column.flat if isinstance(column, Ragged) else column
        kind = pa.from_numpy_dtype(flat.dtype)
        if not isinstance(column, Ragged) and column.ndim == 1:
            columns[name] = pa.array(column, kind)
        else:
            columns[name] = pa.array([np.ravel(column[row]) for row in range(len(shard))], pa.list_(kind))
    parquet.write_table(pa.table(columns), path)


def _read_parquet(path: Path, fields: Mapping[str, FieldInfo]) -> tuple[list[str], dict[str, Column]]:
    from pyarrow import parquet

    table = parquet.read_table(path)
    columns: dict[str, Column] = {}
    for name, info in fields.items():
        dtype, shape = np.dtype(info.dtype), [-1 if length is None else length for length in info.shape]
        rows = [np.asarray(value, dtype=dtype).reshape(shape) for value in table[name].to_pylist()]
        columns[name] = _column(rows, info)
    return table["id"].to_pylist(), columns
