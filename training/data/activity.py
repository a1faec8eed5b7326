"""One conditional document per dataset: who is at work on it, and how often something of it was found wanting."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

from training.documents import END_OF_TIME, parse
from training.errors import DamagedError, InfrastructureError, MissingError
from training.s3.objectstore import Store, Versioned

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Activity:
    """What the document says."""

    format: int = FORMAT
    holders: dict[str, float] = field(default_factory=dict)
    """Claims by name (`writer-…`, `collector-…`), with the time at which each lapses."""
    newest: str = ""
    """The version that was sharded or imported last."""
    generation: int = 0
    """Grows when a version was removed or found damaged: a result remembered from before may name what is gone."""
    version: int = 0
    """Counts the writes (`Store.replace_versioned`)."""


def activity_key(dataset: str) -> str:
    return f"datasets/{dataset}/activity.json"


def read_activity(store: Store, dataset: str) -> Activity:
    return _read(store, dataset)[0]


def change_activity(store: Store, dataset: str, change: Callable[[Activity], Activity]) -> None:
    """Replace the document by `change(document)`, which sees the newest each time and may raise to refuse."""
    key = activity_key(dataset)
    for attempt in range(200):
        activity, maybe_read = _read(store, dataset)
        document = asdict(change(activity))
        if maybe_read is None:
            done = store.create_versioned(key, document)
        else:
            done = store.replace_versioned(key, document, read=maybe_read)
        if done:
            return
        time.sleep(0.01 * min(attempt, 20))
    raise InfrastructureError(f"{store.location.uri(key)} could not be updated: too many writers")


def distrust(store: Store, dataset: str) -> None:
    """From now on no remembered result of the shard stage counts: its next run looks at every shard again."""
    change_activity(store, dataset, lambda activity: replace(activity, generation=activity.generation + 1))


def note_newest(store: Store, dataset: str, digest: str) -> None:
    change_activity(store, dataset, lambda activity: replace(activity, newest=digest))


def _read(store: Store, dataset: str) -> tuple[Activity, Versioned | None]:
    """The document, and what its replacement must name. Raises `DamagedError` with a cure."""
    key = activity_key(dataset)
    try:
        read = store.read_versioned(key)
        activity = parse(Activity, read.document)
        if activity.format != FORMAT:
            raise DamagedError(f"it has another format than {FORMAT}")
        if not all(0 <= lapses < END_OF_TIME for lapses in activity.holders.values()):
            raise DamagedError("holders: a claim lapses at a time that is none")
    except MissingError:
        return Activity(generation=_first_generation(store, dataset)), None
    except DamagedError as error:
        raise DamagedError(
            f"{store.location.uri(key)} is damaged ({error}): while nobody works on dataset {dataset!r}, delete that"
            " object; it is made anew, and the next run looks at every shard again"
        ) from error
    return activity, read


def _first_generation(store: Store, dataset: str) -> int:
    """None that counted before: where versions are, the document was lost, and what was remembered under it is too.

    Who reads it before the document is there, and who makes it, must find the same.
    """
    entries = store.list_entries(f"datasets/{dataset}/manifests/")
    return max((int(entry.modified.timestamp()) for entry in entries), default=0)
