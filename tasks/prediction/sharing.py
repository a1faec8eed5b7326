"""The shards that are to be predicted, dealt out to processes of this machine."""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tasks.lifecycle.model_file import KeptVersion
from tasks.parts import run_parts
from training.config import Preset
from training.data.manifest import ShardInfo
from training.s3.objectstore import StoreLocation


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one of several processes is told, as a JSON document without secrets."""

    kept: KeptVersion
    preset: Preset
    dataset: str
    dataset_digest: str
    prefix: str
    shards: tuple[ShardInfo, ...]
    location: StoreLocation
    parent_pid: int = 0


def predict_shared(part: Part, num_processes: int) -> None:
    """The part's shards by several processes, each with some of them.

    Raises the error that one of them told of, or `InfrastructureError` if one died.
    """
    turned = _turned(part.shards, random.randrange(len(part.shards)))  # nosec B311 # no secret: it spreads work
    count = min(num_processes, len(turned))
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{rank}.json" for rank in range(count)]
        for rank, path in enumerate(paths):
            share = replace(part, shards=tuple(turned[rank::count]), parent_pid=os.getpid())
            path.write_text(json.dumps(asdict(share)))
        run_parts("tasks.prediction.part", paths, what="predict")


def _turned(shards: Sequence[ShardInfo], start: int) -> Sequence[ShardInfo]:
    """From another one on: whoever else is at it begins elsewhere."""
    return [*shards[start:], *shards[:start]]
