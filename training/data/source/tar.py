"""WebDataset archives: neighbouring members with one name up to its first dot are a record, their extensions its
fields.

https://github.com/webdataset/webdataset, "The WebDataset Format".
"""

from __future__ import annotations

import lzma
import tarfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO, Self

import xxhash

from training.data.source.places import SourceFile
from training.errors import UserError
from training.recipe import Record

WHICH_COUNT = "data.glob says which files count"
"""For whoever has others beside them, such as Spark's _SUCCESS."""


MAX_RECORD_BYTES = 1 << 30
"""Of what is unpacked: a few packed bytes can stand for as many as they like."""
MAX_EXTRA_BYTES = 1 << 20
"""Of a header that goes on in a block of its own, which the library reads whole."""
DAMAGE = (
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    OverflowError,
    TypeError,
)
"""What the library raises for an archive that is none, is cut (the last: a packed one, within ten bytes), or says
impossible sizes."""
EXTRA_TYPES = frozenset(
    {tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK}
)


class _StrictTarInfo(tarfile.TarInfo):
    """The library takes a cut, or a damaged header, for an archive's end; here it must have its end mark."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        made = super().frombuf(buf, encoding, errors)
        if made.size < 0 or (made.type in EXTRA_TYPES and made.size > MAX_EXTRA_BYTES):
            raise tarfile.ReadError(f"a member's header says that it has {made.size} bytes")
        return made

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(archive)
        except (tarfile.TruncatedHeaderError, tarfile.EmptyHeaderError) as error:  # type: ignore[attr-defined]  # public, but not in the stubs
            raise tarfile.ReadError("it ends without its end mark") from error
        except tarfile.InvalidHeaderError as error:  # type: ignore[attr-defined]  # public, but not in the stubs
            raise tarfile.ReadError(f"a member's header is damaged: {error}") from error


def tar_samples(file: SourceFile, stream: BinaryIO) -> Iterator[Record]:
    """The archive's records, read as a stream. Raises `UserError` naming the file and the last whole record."""
    key, fields, seen = "", dict[str, bytes](), set[int]()
    try:
        with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_StrictTarInfo) as archive:
            for name, extension, content in _members(file, archive):
                if name != key and fields:
                    yield Record(id=f"{file.name}:{key}", data=b"", fields=fields)
                    fields = {}
                if name != key:
                    _require_new(file, name, seen)
                key = name
                if extension in fields:
                    raise UserError(f"{file.name}: member '{name}.{extension}' comes twice in its record")
                fields[extension] = content
    except DAMAGE as error:
        where = f"{file.name}: not readable as data.format = 'webdataset' " + (
            f"after record {key!r}" if key else "at all"
        )
        raise UserError(f"{where}: {error} ({WHICH_COUNT})") from error
    if fields:
        yield Record(id=f"{file.name}:{key}", data=b"", fields=fields)


def _require_new(file: SourceFile, key: str, seen: set[int]) -> None:
    """Raises `UserError` if a key comes back after another one: its two records would have one id."""
    digest = xxhash.xxh3_64_intdigest(key.encode(errors="surrogateescape"))
    if digest in seen:
        raise UserError(f"{file.name}: the members of record {key!r} are not neighbours")
    seen.add(digest)


def _members(file: SourceFile, archive: tarfile.TarFile) -> Iterator[tuple[str, str, bytes]]:
    """(key, extension, content) of each file but the hidden ones (macOS adds some).

    Raises `UserError` for a link, and for a name that no id can be made of.
    """
    for member in archive:
        folder, slash, base = member.name.rpartition("/")
        if member.isdir() or any(part.startswith(".") for part in member.name.split("/") if part not in (".", "..")):
            continue
        if not member.isfile():
            raise UserError(
                f"{file.name}: member {member.name!r} is a link, or no file: its bytes are not there. Pack the archive"
                " again with tar's --dereference and --hard-dereference"
            )
        if not 0 <= member.size <= MAX_RECORD_BYTES or member.issparse():
            raise UserError(
                f"{file.name}: member {member.name!r} says that it has {member.size} bytes; the most are"
                f" {MAX_RECORD_BYTES}, and none of them holes: cut it into several, or read it as data.format = 'files'"
            )
        try:
            member.name.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{file.name}: member {member.name!a}: its name must be UTF-8") from error
        stem, _, extension = base.partition(".")
        content = archive.extractfile(member)
        assert content is not None
        yield folder + slash + stem, extension.lower(), content.read()
