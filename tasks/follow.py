"""What a run is doing right now, read from its record and events: for the train stage and for the command line."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tasks.bookmark import AT_THE_START, Bookmark, keep_bookmark
from training.runs.events import Event, EventReader
from training.runs.record import Record, RunRecord, generation_prefix

KEEP_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One look at a run."""

    step: int = 0
    num_steps: int
    loss: float | None = None
    samples_per_second: float | None = None
    num_ranks: int = 0
    checkpoint_step: int = 0
    slow: str = ""
    """The node that the others would wait for, if all ranks had the same number of virtual workers."""
    balance: str = ""
    """How many virtual workers the ranks have, if not the same number."""
    trouble: str = ""
    """Why the last group of ranks ended, while the next one has done no step yet."""

    def line(self) -> str:
        """All of it on one line."""
        loss = f"loss {self.loss:.4f}" if self.loss is not None else "starting"
        speed = f"{self.samples_per_second:,.0f} samples/s" if self.samples_per_second else "- samples/s"
        notes = [self.slow, self.balance, self.trouble and f"started again: {self.trouble}"]
        return (
            f"step {self.step}/{self.num_steps}  {loss}  {speed}  {self.num_ranks} ranks"
            f"  checkpoint {self.checkpoint_step}{''.join(f'  {note}' for note in notes if note)}"
        )


class Follower:
    """Reads a run's new events at each `look`; from a bookmark on, the first look gives those that go with it too."""

    def __init__(self, run: RunRecord, *, generation: int, num_steps: int, bookmark: Bookmark = AT_THE_START) -> None:
        self._run = run
        self.generation = generation
        self._prefix = generation_prefix(run.run_key, generation)
        self._bookmark = bookmark
        self._carried = bookmark.events
        self._next_keep = 0.0
        self.progress = Progress(num_steps=num_steps)
        self._num_departures = 0

    def look(self) -> tuple[Record, list[Event]]:
        """The record as it is, and the events that are new since the last look."""
        record = self._run.read()
        if len(record.departures) > self._num_departures:
            self._num_departures = len(record.departures)
            self.progress = replace(self.progress, trouble=record.departures[-1].cause[:200])
        if record.checkpoints:
            newest = max(self.progress.checkpoint_step, record.checkpoints[-1].step)
            self.progress = replace(self.progress, checkpoint_step=newest)
        events = self._read_new(record)
        for event in events:
            self.progress = _after(self.progress, event)
        return record, events

    def keep_bookmark(self) -> None:
        """For the next follower, now and then. Raises `InfrastructureError` if the store is away."""
        now = time.monotonic()
        if now >= self._next_keep:
            keep_bookmark(self._run.store, self._prefix, self._bookmark)
            self._next_keep = now + KEEP_SECONDS

    def _read_new(self, record: Record) -> list[Event]:
        """All of them or, if the store goes away meanwhile, none: the next look begins at the same place."""
        reader = EventReader(self._run.store, self._prefix, self._bookmark.position)
        events = list(reader.read_new(newest_token=record.token))
        self._bookmark = self._bookmark.after(events, reader.position)
        carried, self._carried = self._carried, ()
        return [*carried, *events]


def _slow(maybe_straggler: Mapping[str, Any] | None) -> str:
    return (
        ""
        if maybe_straggler is None
        else "node {node} is slow: rank {rank} takes {factor:.1f} times as long".format(**maybe_straggler)
    )


def _shares(shares: Sequence[int]) -> str:
    fewest, most = min(shares), max(shares)
    return f"{fewest} to {most} virtual workers per rank" if most > fewest + 1 else ""


def _after(progress: Progress, event: Event) -> Progress:
    changes: dict[str, object] = {}
    if event.kind == "step":
        changes = {key: event.values[key] for key in ("loss", "samples_per_second")} | {
            "step": event.step,
            "trouble": "",
        }
    elif event.kind == "checkpoint":
        changes = {"checkpoint_step": event.step}
    elif event.kind == "attempt":
        changes = {"num_ranks": event.values["world_size"], "step": event.step, "slow": "", "balance": ""}
    elif event.kind == "pace":
        changes = {"slow": _slow(event.values["straggler"])}
    elif event.kind == "balance":
        changes = {"balance": _shares(event.values["shares"])}
    return Progress(**{**vars(progress), **changes})
