"""Changes and kept versions for tests of the lifecycle."""

from __future__ import annotations

from typing import Any

from tasks.lifecycle import model_file
from tasks.lifecycle.champion import Change
from tasks.lifecycle.model_file import KeptVersion, Program, Signature, Tensor
from training.s3.objectstore import Store

IMAGE = Tensor(dtype="float32", shape=(-1, 1, 8, 8))
SCORES = Tensor(dtype="float32", shape=(-1, 10))
SIGNATURE = Signature(inputs=IMAGE, outputs=SCORES)


def change(version: str, action: Any = "promote", **values: Any) -> Change:
    known = {"run_key": f"run {version}", "model_sha256": f"digest {version}", "by": "somebody"}
    return Change(action=action, version=version, **(known | values))


def program(version: str) -> Program:
    return Program(data=f"program {version}".encode(), signature=SIGNATURE)


def keep(store: Store, model: str, version: str, run_key: str = "") -> KeptVersion:
    return model_file.keep(
        store,
        model,
        version,
        run_key=run_key or f"run {version}",
        weights_sha256="w",
        dataset_digest="d" * 64,
        fetch=lambda: program(version),
    )
