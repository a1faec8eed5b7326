"""Looks for secrets in all that a stack leaves: databases, logs, results, reports, checkpoints, command lines."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import psutil

from training.errors import MissingError
from training.s3.objectstore import Store

MAX_OBJECTS = 300
"""The newest; the files of the store itself are looked at too, but it packs some of what it keeps. And all reports."""
REPORT = "/report.html"
MAX_BYTES = 1 << 20


def places_of_secrets(
    home: Path, store: Store, secrets: Sequence[str], *, allowed: Collection[Path] = (), processes: Sequence[int] = ()
) -> list[str]:
    """Files below `home`, objects and processes that hold one of them."""
    words = [secret.encode() for secret in secrets]
    return [*_files(home, words, allowed), *_objects(store, words), *_commands(processes, words)]


def _files(home: Path, words: Sequence[bytes], allowed: Collection[Path]) -> Iterator[str]:
    paths = [Path(folder, name) for folder, _, names in os.walk(home) for name in names]
    for path in sorted(set(paths) - set(allowed)):
        with contextlib.suppress(FileNotFoundError):  # the servers are at work: files come, shrink and go
            if path.is_file() and not path.is_symlink() and _holds(path, words):
                yield str(path)


def _holds(path: Path, words: Sequence[bytes]) -> bool:
    """Read, not mapped: to look at a map of what has shrunk meanwhile is the end of this process."""
    overlap, before = max(map(len, words)) - 1, b""
    with path.open("rb") as file:
        while data := file.read(MAX_BYTES):
            data = before + data
            if any(word in data for word in words):
                return True
            before = data[-overlap:] if overlap else b""
    return False


def _objects(store: Store, words: Sequence[bytes]) -> Iterator[str]:
    entries = [entry for entry in store.list_entries("") if entry.num_bytes <= MAX_BYTES]
    entries.sort(key=lambda entry: entry.modified)
    reports = [entry for entry in entries[:-MAX_OBJECTS] if entry.key.endswith(REPORT)]
    for entry in [*reports, *entries[-MAX_OBJECTS:]]:
        with contextlib.suppress(MissingError):  # a run whose test failed may be at work still, and delete
            content = store.get(entry.key)
            if any(word in content for word in words):
                yield store.location.uri(entry.key)


def _commands(processes: Sequence[int], words: Sequence[bytes]) -> Iterator[str]:
    for pid in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended
            command = " ".join(psutil.Process(pid).cmdline())
            if any(word.decode() in command for word in words):
                yield f"process {pid}"
