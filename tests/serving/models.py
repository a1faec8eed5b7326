"""A model on the store, as registration and promotion leave it."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from tasks.serving.published import KeptVersion, Signature, Tensor, champion_key, file_key, version_key
from training.documents import digest_of, sha256_hex
from training.s3.objectstore import Store

NUM_FIELDS = 3
SIGNATURE = Signature(
    inputs=Tensor(dtype="float32", shape=(-1, NUM_FIELDS)), outputs=Tensor(dtype="float32", shape=(-1, NUM_FIELDS))
)


def keep(store: Store, model: str, version: str, data: bytes, signature: Signature = SIGNATURE) -> KeptVersion:
    sha256 = sha256_hex(data)
    kept = KeptVersion(
        model=model,
        version=version,
        run_key=f"run-of-{version}",
        weights_sha256="0" * 64,
        dataset_digest="1" * 64,
        model_sha256=sha256,
        num_bytes=len(data),
        signature=signature,
    )
    store.put_immutable(file_key(model, sha256), data)
    document: dict[str, Any] = {"format": 1, "kept": asdict(kept), "sha256": digest_of(asdict(kept))}
    assert store.create_versioned(version_key(model, version), document)
    return kept


def promote(store: Store, kept: KeptVersion) -> float:
    """Make it champion, as one replace. Returns the moment before (monotonic, in seconds)."""
    key = champion_key(kept.model)
    entry = {"version": kept.version, "model_sha256": kept.model_sha256, "run_key": kept.run_key, "time": time.time()}
    began = time.monotonic()
    if store.create_versioned(key, {"format": 2, "model": kept.model, "entries": [entry]}):
        return began
    read = store.read_versioned(key)
    document = {"format": 2, "model": kept.model, "entries": [*read.document["entries"], entry]}
    assert store.replace_versioned(key, document, read=read)
    return began
