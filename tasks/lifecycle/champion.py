"""The champion of a model and all that were it before: pure functions from one document to the next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal

from training.documents import END_OF_TIME, parse
from training.errors import DamagedError, OvertakenError, UserError

FORMAT = 2
Action = Literal["first", "promote", "rollback", "adopt"]


@dataclass(frozen=True, kw_only=True)
class Change:
    """What somebody wants of a model's champion."""

    action: Action
    version: str
    """Its number in the registry, which is a projection: run key and digest say whose bytes these are."""
    run_key: str
    model_sha256: str
    """Of the model file; empty in what a document of format 1 tells."""
    by: str
    reason: str = ""
    decision_sha256: str | None = None
    """Of the gate's decision, if one was asked."""


@dataclass(frozen=True, kw_only=True)
class Entry(Change):
    """A change that was made: its version has been champion from then on."""

    sequence: int
    time: float
    """In seconds since 1970; 0 where a document of format 1 does not tell. Never before the entry before it."""

    @property
    def when(self) -> str:
        """For a reader."""
        return datetime.fromtimestamp(self.time, UTC).isoformat(timespec="seconds") if self.time else "unknown"


@dataclass(frozen=True, kw_only=True)
class Champion:
    """The document: all entries, in order. The last one is the champion."""

    model: str
    entries: tuple[Entry, ...]
    format: int = FORMAT

    @property
    def current(self) -> Entry:
        return self.entries[-1]

    def at(self, time: float) -> Entry:
        """The entry that stood at `time` (seconds since 1970). Raises `UserError` for a time before all."""
        standing = [entry for entry in self.entries if entry.time <= time]
        if not standing:
            raise UserError(f"model {self.model!r} had no champion before {self.entries[0].when}")
        return standing[-1]


def begun(model: str, change: Change, *, now: float) -> Champion:
    """The document of a model that had no champion yet. `now` is in seconds since 1970."""
    return Champion(model=model, entries=(Entry(sequence=1, time=now, **asdict(change)),))


def with_change(champion: Champion, change: Change, *, replaces: int, now: float) -> Champion:
    """The document after a change that was judged against entry `replaces`.

    Raises as `require_current` does. `now` is in seconds since 1970; a clock that goes back makes no entry older than
    the one before.
    """
    require_current(champion, replaces)
    last = champion.current
    entry = Entry(sequence=last.sequence + 1, time=max(now, last.time), **asdict(change))
    return replace(champion, entries=(*champion.entries, entry))


def require_current(champion: Champion, replaces: int) -> None:
    """Raises `OvertakenError`, which says who was first, if entry `replaces` is no more the newest."""
    last = champion.current
    if last.sequence != replaces:
        raise OvertakenError(
            f"model {champion.model!r}: version {last.version} has become champion meanwhile ({last.action} by"
            f" {last.by}, {last.when}, change {last.sequence}), and this was judged against change {replaces}: nothing"
            " was changed; judge it against the new champion by giving the command again"
        )


def predecessor(champion: Champion) -> Entry:
    """What a rollback goes back to: the champion before this one, where what was rolled back itself does not count.

    So one rollback after another goes further back. Raises `UserError` at the first champion.
    """
    standing: list[Entry] = []
    for entry in champion.entries:
        if entry.action == "rollback":
            places = [place for place, one in enumerate(standing) if one.version == entry.version]
            del standing[max(places, default=len(standing)) :]
        standing.append(entry)
    if len(standing) < 2:
        raise UserError(f"model {champion.model!r}: there was no champion before version {champion.current.version}")
    return standing[-2]


def earlier(champion: Champion, version: str) -> Entry:
    """The newest entry by which `version` became champion. Raises `UserError` if it never was."""
    for entry in reversed(champion.entries):
        if entry.version == version:
            return entry
    raise UserError(
        f"model {champion.model!r}: version {version} never was champion: see `unbroken models history"
        f" {champion.model}`, or promote it"
    )


def moment(text: str) -> float:
    """Seconds since 1970 of a time in ISO 8601, in UTC if it names no zone. Raises `UserError`."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError as error:
        raise UserError(f"{text!r} is no time: write it as 2026-11-27T08:00, or 2026-11-27T08:00+01:00") from error
    return (found if found.tzinfo is not None else found.replace(tzinfo=UTC)).timestamp()


def to_json(champion: Champion) -> dict[str, Any]:
    return asdict(champion)


def from_json(document: Mapping[str, Any]) -> Champion:
    """The inverse. A document of format 1, which named the first champion alone, is a history of one.

    Raises `DamagedError` for what is neither, or whose entries are not numbered from 1.
    """
    if document.get("format") == 1:
        return _from_format_1(document)
    champion = parse(Champion, document)
    if champion.format != FORMAT:
        raise DamagedError(f"it has format {champion.format}, which this release cannot read")
    if not champion.entries or [entry.sequence for entry in champion.entries] != [*range(1, len(champion.entries) + 1)]:
        raise DamagedError("its entries are not numbered from 1")
    if not all(0 <= entry.time < END_OF_TIME for entry in champion.entries):
        raise DamagedError("one of its entries has a time that is none")
    return champion


def _from_format_1(document: Mapping[str, Any]) -> Champion:
    first = Change(
        action="first",
        version=str(document.get("version_of_registry", "")),
        run_key=str(document.get("run_key", "")),
        model_sha256="",
        by="registration",
    )
    return begun(str(document.get("model", "")), first, now=0.0)
