"""One conditional document per dataset: who is at work on it, and how often something of it was found wanting."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from training.documents import parse
from training.errors import DamagedError, InfrastructureError
from training.objectstore import MissingError, Store

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Activity:
    """What the document says."""

    format: int = FORMAT
    holders: dict[str, float] = field(default_factory=dict)
    """Claims by name (`writer-…`, `collector-…`), with the time at which each lapses."""
    generation: int = 0
    """Grows when a version was removed or found damaged: a result remembered from before may name what is gone."""


def activity_key(dataset: str) -> str:
    return f"datasets/{dataset}/activity.json"


def read_activity(store: Store, dataset: str) -> Activity:
    try:
        return _parsed(store.read_versioned(activity_key(dataset)).document)
    except MissingError:
        return Activity()


def change_activity(store: Store, dataset: str, change: Callable[[Activity], Activity]) -> None:
    """Replace the document by `change(document)`, which sees the newest each time and may raise to refuse."""
    key = activity_key(dataset)
    for attempt in range(200):
        if _try_to_change(store, key, change):
            return
        time.sleep(0.01 * min(attempt, 20))
    raise InfrastructureError(f"{store.location.uri(key)} could not be updated: too many writers")


def distrust(store: Store, dataset: str) -> None:
    """From now on no remembered result of the shard stage counts: its next run looks at every shard again."""
    change_activity(store, dataset, lambda activity: replace(activity, generation=activity.generation + 1))


def _try_to_change(store: Store, key: str, change: Callable[[Activity], Activity]) -> bool:
    try:
        read = store.read_versioned(key)
    except MissingError:
        return store.create_versioned(key, asdict(change(Activity())))
    return store.replace_versioned(key, asdict(change(_parsed(read.document))), read=read)


def _parsed(document: Mapping[str, Any]) -> Activity:
    activity = parse(Activity, document)
    if activity.format != FORMAT:
        raise DamagedError(f"a dataset's activity.json has another format than {FORMAT}: it needs another release")
    return activity
