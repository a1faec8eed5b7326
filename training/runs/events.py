"""What happened in a run: create-only chunks of JSON lines on the object store, with their own timestamps.

runs/KEY/GENERATION/events/TOKEN/N.jsonl: one writer per token (rank 0), chunks numbered from 0 without a gap.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from training.documents import END_OF_TIME, canonical_json, parse, read_document
from training.errors import DamagedError, MissingError, UnbrokenError
from training.s3.objectstore import Store

FLUSH_SECONDS = 1.0
START = (1, 0)
"""The position, (token, chunk), of a run's first chunk."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """One thing that happened. `step` counts finished steps, from 1; metrics are numbers by name."""

    kind: str
    time: float
    token: int
    step: int
    values: dict[str, Any] = field(default_factory=dict)

    def to_line(self) -> bytes:
        fields = {"kind": self.kind, "time": self.time, "step": self.step, "values": self.values}
        return canonical_json(fields) + b"\n"


def _is_count(value: Any) -> bool:
    return type(value) is int


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _are_figures(value: Any) -> bool:
    """As `json_number` writes them."""
    return isinstance(value, dict) and all(_is_number(v) or v in ("nan", "inf", "-inf") for v in value.values())


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and value != [] and all(map(_is_count, value))


def _is_straggler(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict)
        and _is_count(value.get("rank"))
        and _is_count(value.get("node"))
        and _is_number(value.get("factor"))
    )


TOLD: Mapping[str, Mapping[str, Callable[[Any], bool]]] = {
    "attempt": {"world_size": _is_count, "source": lambda value: isinstance(value, str)},
    "step": {
        **dict.fromkeys(("loss", "grad_norm", "learning_rate", "samples_per_second", "seconds"), _is_number),
        "validation": _are_figures,
    },
    "pace": {"straggler": _is_straggler},
    "balance": {"shares": _are_counts},
}
"""What the values of an event are, by its kind, as far as anybody counts on them."""
NOT_ALWAYS_TOLD = frozenset({"source", "seconds", "validation"})


def json_number(value: float) -> float | str:
    """As JSON can hold it: "nan" and "inf" are strings, which float() reads."""
    return value if math.isfinite(value) else str(value)


def chunk_key(prefix: str, token: int, number: int) -> str:
    return f"{prefix}events/{token:06d}/{number:06d}.jsonl"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What rank 0 tells of a finished step. All ranks keep it, until a checkpoint holds that step."""

    time: float
    step: int
    values: dict[str, Any]


class EventWriter:
    """Collects events and sends them in chunks, off the training thread.

    A store that is away only delays them; `flush` waits and raises.
    """

    def __init__(self, store: Store, prefix: str, token: int) -> None:
        self._store = store
        self._prefix = prefix
        self._token = token
        self._pending: list[bytes] = []
        self._in_flight: list[bytes] = []
        self._next_chunk = 0
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)
        self._thread.start()

    def add(self, kind: str, *, step: int, **values: Any) -> None:
        self._add(Event(kind=kind, time=time.time(), token=self._token, step=step, values=values))

    def add_again(self, entry: Entry) -> None:
        """A step, as it was noted when it was done."""
        self._add(Event(kind="step", time=entry.time, token=self._token, step=entry.step, values=entry.values))

    def _add(self, event: Event) -> None:
        line = event.to_line()
        with self._lock:
            self._pending.append(line)

    def flush(self) -> None:
        """Return when everything added so far is on the store. Raises `InfrastructureError`."""
        with self._sending:
            self._send()  # what an earlier flush could not send, as it was: a reader may have seen it
            with self._lock:
                self._in_flight, self._pending = self._pending, []
            self._send()

    def _send(self) -> None:
        if self._in_flight:
            self._store.put(chunk_key(self._prefix, self._token, self._next_chunk), b"".join(self._in_flight))
            self._next_chunk += 1
            self._in_flight = []

    def close(self) -> None:
        self._stopped.set()
        self._thread.join()
        self.flush()

    def abandon(self) -> None:
        """Send nothing more: the next group tells what this one had no time to tell."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(FLUSH_SECONDS):
            try:
                self.flush()
            except UnbrokenError:  # kept, and sent with the next chunk
                continue


class EventReader:
    """Reads a run's chunks as they appear, token by token. `position` is (token, chunk) of the next one."""

    def __init__(self, store: Store, prefix: str, position: tuple[int, int] = START) -> None:
        self._store = store
        self._prefix = prefix
        self.position = position

    def read_next(self) -> list[Event]:
        """The events of one chunk. Raises `MissingError` if it is not there yet, `DamagedError` if it holds none."""
        token, chunk = self.position
        key = chunk_key(self._prefix, token, chunk)
        data = self._store.get(key)
        self.position = token, chunk + 1
        return _parse(data, token, uri=self._store.location.uri(key))

    def read_new(self, *, newest_token: int) -> Iterator[Event]:
        """Every event of the chunks that appeared since. A token is left once a newer one exists."""
        while True:
            token, _ = self.position
            try:
                events = self.read_next()
            except MissingError:
                if token >= newest_token:
                    return
                self.position = token + 1, 0
                continue
            yield from events


def _parse(data: bytes, token: int, *, uri: str) -> list[Event]:
    """Raises `DamagedError`, which says what to do, if any line is no event."""
    try:
        events = [parse(Event, {**read_document(line, what="a line"), "token": token}) for line in data.splitlines()]
        for event in events:
            require_well_formed(event)
        return events
    except DamagedError as error:
        raise DamagedError(f"{uri}: {error}; put an empty object there, and its events are left out") from error


def require_well_formed(event: Event) -> None:
    """Raises `DamagedError` for a time that is none, or without the values that one of its kind has."""
    if not 0 <= event.time < END_OF_TIME:
        raise DamagedError(f"an event has the time {event.time:g}, which is none")
    for name, is_well_formed in TOLD.get(event.kind, {}).items():
        if name in event.values and not is_well_formed(event.values[name]):
            raise DamagedError(f"an event of kind {event.kind!r} is damaged: {name}: it is {event.values[name]!r:.40}")
        if name not in event.values and name not in NOT_ALWAYS_TOLD:
            raise DamagedError(f"an event of kind {event.kind!r} is damaged: {name}: it is missing")


def committed(events: Iterable[Event], resume_steps: Sequence[int | None]) -> list[Event]:
    """The step events that count: those of token T up to the step from which any later token resumed.

    `resume_steps[t - 1]` is where token t began; None: it never did. The result has each step once, in order.
    """
    limits: dict[int, float] = {}
    limit = float("inf")
    for token in range(len(resume_steps), 0, -1):
        limits[token] = limit
        began = resume_steps[token - 1]
        limit = limit if began is None else min(limit, began)
    steps = {
        event.step: event
        for event in events
        if event.kind == "step" and event.step <= limits.get(event.token, float("inf"))
    }
    return [steps[step] for step in sorted(steps)]
