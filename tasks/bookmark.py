"""Where a follower stands in a run's events, kept on the store so that the next one need not read all that came before.

It is believed only as far as MLflow's points reach (docs/protocols.md, "MLflow: one run, one point per step").
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from training.documents import parse, sealed, unsealed
from training.errors import DamagedError, MissingError
from training.runs.events import START, Event, require_well_formed
from training.runs.record import Record, generation_prefix
from training.s3.objectstore import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Bookmark:
    """A place between two chunks."""

    instance: str = ""
    """Of the run's record: another run of the same key, begun after this one was removed, has other chunks."""
    position: tuple[int, int] = START
    step: int = 0
    """No event before tells of a later step."""
    events: tuple[Event, ...] = ()
    """Those before that a follower still needs: how each group began, the newest step, pace and balance."""

    def after(self, events: Sequence[Event], position: tuple[int, int]) -> Bookmark:
        """The place behind these events, too."""
        known = (*self.events, *events)
        newest = {event.kind: event for event in known if event.kind in ("step", "pace", "balance")}
        return Bookmark(
            instance=self.instance,
            position=position,
            step=max(self.step, *(event.step for event in events if event.kind == "step"), 0),
            events=tuple(event for event in known if event.kind == "attempt" or event is newest.get(event.kind)),
        )


AT_THE_START = Bookmark()


def keep_bookmark(store: Store, prefix: str, bookmark: Bookmark) -> None:
    """Under the prefix of its generation. Each follower may keep its own over that of another: all are good.

    Raises `InfrastructureError` if the store is away.
    """
    store.put(_key(prefix, bookmark.instance), sealed("bookmark", asdict(bookmark)))


def find_bookmark(store: Store, record: Record, *, told_step: float) -> Bookmark:
    """The one that was kept, if all steps before it are among those that MLflow has, up to `told_step`; else the start.

    Raises `InfrastructureError` if the store is away.
    """
    start = Bookmark(instance=record.instance)
    key = _key(generation_prefix(record.key, record.generation), record.instance)
    try:
        found = parse(Bookmark, unsealed("bookmark", store.get(key)))
        for event in found.events:
            require_well_formed(event)
    except MissingError:
        return start
    except DamagedError as error:
        log.warning("%s: the events of run %s are read from their start", error, record.key[:12])
        return start
    return found if found.step <= told_step else start


def _key(prefix: str, instance: str) -> str:
    return f"{prefix}bookmarks/{instance}.json"
