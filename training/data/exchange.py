"""Interchange: a dataset version as WebDataset archives or Parquet files, and back, so that nobody is locked in.

One file per shard, `train-00000.tar`. Coming back, each file is a shard again: the same version, to the last bit.
"""

from __future__ import annotations

import io
import json
import math
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from training.data.lease import publish, writing
from training.data.manifest import (
    SPLITS,
    FieldInfo,
    Manifest,
    ShardInfo,
    Split,
    describe_shard,
    load_manifest,
    load_shard,
    shard_key,
)
from training.data.shard import Array, Column, Ragged, Shard, encode_shard
from training.data.withdrawn import require_none_withdrawn, require_none_withdrawn_since, withdrawn_records
from training.documents import parse, read_document
from training.errors import DamagedError, InfrastructureError, UserError
from training.s3.objectstore import Store

if TYPE_CHECKING:
    import pyarrow

Format = Literal["webdataset", "parquet"]
Fields = Mapping[str, FieldInfo]
Samples = tuple[list[str], dict[str, Column]]
SUFFIXES: dict[Format, str] = {"webdataset": "tar", "parquet": "parquet"}
ABOUT = "dataset.json"
"""Beside the files: what neither format can say (which file belongs to which split, classes, what it must give)."""


@dataclass(frozen=True, kw_only=True)
class About:
    """The document beside the files."""

    format: Format
    fields: dict[str, FieldInfo]
    files: dict[Split, dict[str, str]]
    """Each file's name, in order, and the sha256 of the shard that it holds."""
    digest: str
    """Of the version that was exported."""
    classes: tuple[str, ...] = ()


def export(store: Store, dataset: str, digest: str, folder: Path, *, form: Format) -> Iterator[Path]:
    """Write a version's files into an empty or new folder; gives each when it is written."""
    manifest = load_manifest(store, dataset, digest)
    _require_holds(form, manifest.fields)
    with _errors_of(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"{folder} is not empty: name a new folder")
    write = _write_tar if form == "webdataset" else _write_parquet
    files: dict[Split, dict[str, str]] = {split: {} for split in SPLITS}
    for split in SPLITS:
        for number, info in enumerate(manifest.splits[split]):
            path = folder / f"{split}-{number:05}.{SUFFIXES[form]}"
            shard = load_shard(store, dataset, info)
            with _errors_of(folder):
                write(path, shard, manifest.fields)
            files[split][path.name] = info.sha256
            yield path
    about = About(format=form, fields=dict(manifest.fields), files=files, digest=digest, classes=manifest.classes)
    with _errors_of(folder):
        (folder / ABOUT).write_text(json.dumps(asdict(about), indent=1) + "\n")


def _require_holds(form: Format, fields: Fields) -> None:
    """Raises `UserError` for a field that the format would hide, or not give back."""
    if form == "parquet" and "id" in fields:
        raise UserError("field 'id' would take the place of the samples' ids in Parquet: export as webdataset")
    for name, info in fields.items():
        if form == "webdataset" and "/" in name:
            raise UserError(f"field {name!r} would be a folder in a WebDataset archive: export as parquet")
        if form == "parquet" and _is_ragged(info) and 0 in info.shape:
            raise UserError(f"field {name!r} has no values, and Parquet loses its rows' lengths: export as webdataset")


@contextmanager
def _errors_of(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InfrastructureError(f"cannot write to {folder}: {error.strerror}") from error


def import_folder(store: Store, dataset: str, folder: Path) -> Manifest:
    """Make a version of the files that `export` wrote: the same one, to the last bit.

    Raises `UserError` naming the file that is not as it was, or a record that was withdrawn.
    """
    about = _about(folder)
    withdrawn = withdrawn_records(store, dataset)
    read = _read_tar if about.format == "webdataset" else _read_parquet
    splits: dict[Split, tuple[ShardInfo, ...]] = {}
    with writing(store, dataset) as lease:
        for split in SPLITS:
            shards = about.files[split].items()
            splits[split] = tuple(_send(store, dataset, folder / name, sha, about, read) for name, sha in shards)
            require_none_withdrawn(dataset, (load_shard(store, dataset, s) for s in splits[split]), withdrawn)
        manifest = Manifest(fields=about.fields, splits=splits, classes=about.classes)
        if manifest.digest != about.digest:
            raise UserError(f"{folder / ABOUT}: not as it was exported: it does not give version {about.digest[:12]}")
        publish(store, dataset, manifest, lease)
    require_none_withdrawn_since(store, dataset, withdrawn)
    return manifest


Read = Callable[[Path, Fields], Samples]


def _send(store: Store, dataset: str, path: Path, sha256: str, about: About, read: Read) -> ShardInfo:
    try:
        ids, columns = read(path, about.fields)
        data = encode_shard(ids, columns)
    except Exception as error:  # whatever a strange file brings about, the file is the place to look
        raise UserError(f"{path}: not as it was exported: {type(error).__name__}: {error}") from error
    info = describe_shard(data, num_samples=len(ids))
    if info.sha256 != sha256:
        raise UserError(f"{path}: not as it was exported: its samples do not give shard {sha256[:12]}")
    store.put_immutable(shard_key(dataset, sha256), data)
    return info


def _about(folder: Path) -> About:
    path = folder / ABOUT
    if not path.is_file():
        raise UserError(f"{folder} has no {ABOUT}: name a folder that `unbroken data export` wrote")
    try:
        about = parse(About, read_document(path.read_text(), what=ABOUT))
        if any(Path(name).name != name for split in SPLITS for name in about.files[split]):
            raise ValueError("it names files elsewhere")
    except (OSError, ValueError, KeyError, DamagedError) as error:
        raise UserError(f"{path}: not what an export leaves there: {error}; export the version again") from error
    return about


def _is_ragged(info: FieldInfo) -> bool:
    return info.shape[:1] == (None,)


# ---- WebDataset ------------------------------------------------------------------------------------------------------


def _write_tar(path: Path, shard: Shard, fields: Fields) -> None:
    """A sample is KEY.id (its id) and KEY.FIELD.npy; the key is file and row, since it may have no dot."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for row in range(len(shard)):
            key = f"{path.stem}-{row:07}"
            _add(archive, f"{key}.id", shard.id_of(row).encode())
            for name in sorted(fields):
                file = io.BytesIO()
                np.save(file, shard.columns[name][row], allow_pickle=False)
                _add(archive, f"{key}.{name}.npy", file.getvalue())


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # no time, no owner: the same bytes each time
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def _read_tar(path: Path, fields: Fields) -> Samples:
    ids: list[str] = []
    rows: dict[str, list[Array]] = {name: [] for name in fields}
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            try:
                _take_member(archive, member, ids, rows)
            except (ValueError, KeyError, EOFError) as error:
                raise ValueError(f"member {member.name!r}: {error}") from error
    if any(len(found) != len(ids) for found in rows.values()):
        raise ValueError("some samples lack a field")
    return ids, {name: _column(rows[name], info) for name, info in fields.items()}


def _take_member(
    archive: tarfile.TarFile, member: tarfile.TarInfo, ids: list[str], rows: dict[str, list[Array]]
) -> None:
    _, _, extension = member.name.partition(".")
    content = archive.extractfile(member)
    if content is None or member.issparse():
        raise ValueError("it is no file, or one with holes")
    if extension == "id":
        ids.append(content.read().decode())
    else:
        rows[extension.removesuffix(".npy")].append(_array_of(content.read()))


def _array_of(content: bytes) -> Array:
    """Raises `ValueError` for what is no array, or says that it is larger than it is."""
    stream = io.BytesIO(content)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("it is no .npy file of version 1.0")
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    if len(content) - stream.tell() != math.prod(shape) * dtype.itemsize:
        raise ValueError("its length is not what its header says")
    stream.seek(0)
    array: Array = np.lib.format.read_array(stream, allow_pickle=False)
    return array


def _column(rows: list[Array], info: FieldInfo) -> Column:
    return Ragged.stack(rows) if _is_ragged(info) else np.stack(rows)


# ---- Parquet ---------------------------------------------------------------------------------------------------------


def _write_parquet(path: Path, shard: Shard, fields: Fields) -> None:
    """A column `id`, and one per field: scalars as they are, arrays as flat lists whose shape is in the metadata."""
    import pyarrow as pa
    from pyarrow import parquet

    arrays = [pa.array(shard.ids, pa.string()), *(to_arrow(shard.columns[name]) for name in sorted(fields))]
    about = [
        pa.field(name, array.type, metadata={"shape": json.dumps(fields[name].shape)} if name in fields else None)
        for name, array in zip(["id", *sorted(fields)], arrays, strict=True)
    ]
    parquet.write_table(pa.Table.from_arrays(arrays, schema=pa.schema(about)), path)


def to_arrow(column: Column) -> pyarrow.Array:
    """Scalars as they are, arrays as flat lists."""
    import pyarrow as pa

    flat = column.flat if isinstance(column, Ragged) else column
    values = pa.array(np.require(flat, requirements=["C", "A"]).reshape(-1))  # shards do not align columns
    if not isinstance(column, Ragged) and column.ndim == 1:
        return values
    if isinstance(column, Ragged) or not flat.size:
        ends = column.ends if isinstance(column, Ragged) else np.zeros(len(column), dtype=np.int64)
        per_row = int(np.prod(flat.shape[1:]))
        return pa.LargeListArray.from_arrays(np.concatenate([[0], ends * per_row]), values)
    return pa.FixedSizeListArray.from_arrays(values, flat.size // len(flat))


def _read_parquet(path: Path, fields: Fields) -> Samples:
    from pyarrow import parquet

    table = parquet.read_table(path).combine_chunks()
    columns = {name: _from_arrow(table[name].chunk(0), info) for name, info in fields.items()}
    return table["id"].to_pylist(), columns


def _from_arrow(array: Any, info: FieldInfo) -> Column:
    values = array.flatten() if info.shape else array
    flat = values.to_numpy(zero_copy_only=False).astype(info.dtype, copy=False)
    inner = [int(length or 0) for length in info.shape[1:]]
    if not _is_ragged(info):
        column: Column = flat.reshape(len(array), *info.shape)
        return column
    ends = np.cumsum(array.value_lengths().to_numpy(), dtype=np.int64) // max(int(np.prod(inner)), 1)
    return Ragged(flat.reshape(-1, *inner), ends)
