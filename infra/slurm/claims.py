"""Which array trains a run: one document per run on the object store, changed by compare-and-set only.

Slurm itself makes as many jobs of one name as are asked for; this makes one of them the run's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

from training.documents import parse
from training.errors import InfrastructureError, MissingError
from training.s3.objectstore import Store

NUM_TRIES = 50


@dataclass(frozen=True, kw_only=True)
class Claim:
    """The array whose agents may train, and who wants it. No array: the run was cancelled."""

    job_id: str = ""
    generation: int = 0
    owners: tuple[str, ...] = ()


def read_claim(store: Store, key: str) -> Claim:
    """An empty one if there is none."""
    try:
        return parse(Claim, store.read_versioned(_object_key(key)).document)
    except MissingError:
        return Claim()


def change_claim(store: Store, key: str, change: Callable[[Claim], Claim]) -> Claim:
    """What the claim is now. `change` sees the newest each time, and may raise to refuse."""
    for _ in range(NUM_TRIES):
        try:
            read = store.read_versioned(_object_key(key))
        except MissingError:
            store.create_versioned(_object_key(key), asdict(Claim()))
            continue
        before = parse(Claim, read.document)
        after = change(before)
        if after == before or store.replace_versioned(_object_key(key), asdict(after), read=read):
            return after
    raise InfrastructureError(f"{_object_key(key)} could not be updated: too many writers")


def _object_key(key: str) -> str:
    return f"engine/slurm/{key}.json"
