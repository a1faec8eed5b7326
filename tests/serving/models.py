"""A model on the store, as registration and promotion leave it."""

from __future__ import annotations

import time

from tasks.lifecycle import champions, model_file
from tasks.lifecycle.champion import Change, with_change
from tasks.lifecycle.model_file import KeptVersion, Program, Signature, Tensor
from training.s3.objectstore import Store

NUM_FIELDS = 3
SIGNATURE = Signature(
    inputs=Tensor(dtype="float32", shape=(-1, NUM_FIELDS)), outputs=Tensor(dtype="float32", shape=(-1, NUM_FIELDS))
)


def keep(store: Store, model: str, version: str, data: bytes, signature: Signature = SIGNATURE) -> KeptVersion:
    return model_file.keep(
        store,
        model,
        version,
        run_key=f"run-of-{version}",
        weights_sha256="0" * 64,
        dataset_digest="1" * 64,
        fetch=lambda: Program(data=data, signature=signature),
    )


def promote(store: Store, kept: KeptVersion) -> float:
    """Make it champion, as one replace. Returns the moment before (monotonic, in seconds)."""
    change = Change(
        action="promote",
        version=kept.version,
        run_key=kept.run_key,
        model_sha256=kept.model_sha256,
        by="a test",
    )
    began = time.monotonic()
    if champions.find(store, kept.model) is None:
        champions.begin(store, kept.model, change)
    else:
        champions.change(
            store,
            kept.model,
            lambda champion: with_change(champion, change, replaces=champion.current.sequence, now=time.time()),
        )
    return began
