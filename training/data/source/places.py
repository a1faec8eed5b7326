"""The places where files lie: folders of this machine and buckets, listed in the order of names, opened as streams."""

from __future__ import annotations

import fnmatch
import hashlib
import importlib.util
import io
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import BinaryIO, Protocol, cast

from training.config import DataConfig
from training.data.source.remote import RemoteFile
from training.errors import UserError
from training.s3.objectstore import Store, StoreLocation

BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One file of the source: its name below the source's root, and what a listing tells of its bytes."""

    name: str
    num_bytes: int
    changed: str
    """When it last changed, as the source tells: an ETag, or the times (in nanoseconds) of its bytes, which whoever
    writes may set back, and of its entry in the folder, which nobody can."""


class Source(Protocol):
    """A place that lists files and opens them."""

    def list_files(self) -> Iterator[SourceFile]: ...

    def open(self, file: SourceFile) -> BinaryIO: ...

    def content_digest(self, file: SourceFile) -> str: ...

    def require_unchanged(self, file: SourceFile) -> None: ...


class Folder:
    """A file, or every matching file below a folder, on this machine."""

    def __init__(self, root: Path, config: DataConfig) -> None:
        self._root = root
        self._config = config

    def list_files(self) -> Iterator[SourceFile]:
        if self._root.is_file():
            yield _source_file(self._root, self._root.name)
            return
        for name in sorted(self._names(self._root, "", frozenset({self._root.resolve()}))):
            yield _source_file(self._root / name, name)

    def _names(self, folder: Path, prefix: str, above: frozenset[Path]) -> Iterator[str]:
        """Every matching file below a folder, through links too. Raises `UserError` for what cannot be looked into."""
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            raise UserError(f"cannot list {folder}: {error.strerror}") from error
        for entry in entries:
            name, path = prefix + entry.name, Path(entry.path)
            if entry.is_dir():
                if entry.name.startswith(".") or entry.name in self._config.exclude:
                    continue
                real = path.resolve()
                if real in above:
                    raise UserError(f"{path} leads back to {real}: name it in data.exclude")
                yield from self._names(path, f"{name}/", above | {real})
            elif _counts(name, self._config):
                yield name

    def require_unchanged(self, file: SourceFile) -> None:
        """Raises `UserError` if the file is not the one that was listed."""
        path = self._root if self._root.is_file() else self._root / file.name
        if _source_file(path, file.name) != file:
            raise UserError(f"{path} was changed while it was read: start again once nobody writes there")

    def open(self, file: SourceFile) -> BinaryIO:
        path = self._root if self._root.is_file() else self._root / file.name
        try:
            return path.open("rb")
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error

    def content_digest(self, file: SourceFile) -> str:
        with self.open(file) as stream:
            return _sha256_of(stream)


def _sha256_of(stream: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := stream.read(BLOCK_BYTES):
        digest.update(block)
    return digest.hexdigest()


def _source_file(path: Path, name: str) -> SourceFile:
    try:
        name.encode()
        stat = path.stat()
    except UnicodeEncodeError as error:
        raise UserError(f"{name!a}: a file's name must be UTF-8") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if not S_ISREG(stat.st_mode):
        raise UserError(f"{path} is no file: choose data.glob so that it does not count, or exclude its folder")
    return SourceFile(name=name, num_bytes=stat.st_size, changed=f"{stat.st_mtime_ns} {stat.st_ctime_ns}")


class Bucket:
    """An object, or every matching object below a prefix, in S3."""

    def __init__(self, store: Store, config: DataConfig) -> None:
        self._store = store
        self._config = config
        prefix = store.location.prefix
        self._slash = "/" if prefix and not prefix.endswith("/") else ""
        self._maybe_single = prefix.rpartition("/")[2] if self._slash and store.exists("") else None

    def list_files(self) -> Iterator[SourceFile]:
        """In the order of names, as on disk: stores differ in the order of their listings."""
        for entry in sorted(self._store.list_entries(""), key=lambda entry: entry.key):
            key, num_bytes, etag = entry.key, entry.num_bytes, entry.etag
            if self._maybe_single is not None:
                if not key:
                    yield SourceFile(name=self._maybe_single, num_bytes=num_bytes, changed=etag)
            elif key.startswith(self._slash) and key and not key.endswith("/"):  # a listing finds longer neighbours too
                name = key.removeprefix(self._slash)
                if _counts(name, self._config):
                    yield SourceFile(name=name, num_bytes=num_bytes, changed=etag)

    def open(self, file: SourceFile) -> BinaryIO:
        key = "" if self._maybe_single is not None else self._slash + file.name
        raw = RemoteFile(self._store, key, num_bytes=file.num_bytes, etag=file.changed)
        return cast(BinaryIO, io.BufferedReader(raw, buffer_size=BLOCK_BYTES))

    def content_digest(self, file: SourceFile) -> str:
        with self.open(file) as stream:
            return _sha256_of(stream)

    def require_unchanged(self, file: SourceFile) -> None:
        """Nothing to do: each request names the ETag that was listed."""


def open_source(config: DataConfig, *, folder: str, location: StoreLocation) -> Source:
    """The source that `config.source` names. Raises `UserError` naming it if nothing is there."""
    text = config.source
    if text.startswith("s3://"):
        bucket, _, prefix = text.removeprefix("s3://").partition("/")
        if not bucket:
            raise UserError(f"data.source = {text!r} names no bucket")
        where = StoreLocation(endpoint=location.endpoint, bucket=bucket, prefix=prefix, region=location.region)
        return Bucket(Store(where), config)
    if "://" in text and not text.startswith(("stdlib://", "package://")):
        raise UserError(f"data.source = {text!r}: a source is a path, s3://BUCKET/PREFIX, package://… or stdlib://")
    path = _local_path(text, folder)
    if not path.exists():
        raise UserError(f"data.source = {text!r}: {path} does not exist")
    return Folder(path, config)


def _local_path(text: str, folder: str) -> Path:
    if text.startswith("stdlib://"):
        return Path(sysconfig.get_path("stdlib")) / text.removeprefix("stdlib://")
    if text.startswith("package://"):
        package, _, inside = text.removeprefix("package://").partition("/")
        try:
            spec = importlib.util.find_spec(package)
        except (ImportError, ValueError):
            spec = None
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f"data.source = {text!r}: no installed package {package!r}")
        return Path(spec.submodule_search_locations[0]) / inside
    return Path(folder) / Path(text).expanduser()


def _counts(name: str, config: DataConfig) -> bool:
    parts = name.split("/")
    if any(part.startswith(".") for part in parts) or set(parts[:-1]) & set(config.exclude):
        return False
    return fnmatch.fnmatchcase(parts[-1], config.glob)
