"""`python -m tasks.prediction.part PART.json`: predict some shards, in one of several processes.

A shard's predictions are one object, written once; a process that dies leaves none that is not whole.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from tasks.lifecycle import model_file
from tasks.parts import errors_told
from tasks.prediction.inputs import input_batches
from tasks.prediction.kept import FORMAT, find_shards, shard_key
from tasks.prediction.sharing import Part
from tasks.prediction.table import to_parquet
from tasks.serving import program
from tasks.serving.program import Program
from training.data.manifest import Manifest, ShardInfo, load_manifest
from training.documents import parse, sha256_hex
from training.processes import die_with
from training.recipe import Recipe, load_recipe
from training.s3.objectstore import Store


def predict_part(store: Store, part: Part) -> None:
    """Every shard of the part that nobody has predicted meanwhile.

    Raises `DamagedError` for a damaged model file before a shard is read.
    """
    program.prepare()
    kept = part.kept
    data = model_file.prove(store, kept)
    model = program.load(data, version=kept.version, sha256=kept.model_sha256, signature=kept.signature)
    recipe = load_recipe(part.preset)
    manifest = load_manifest(store, part.dataset, part.dataset_digest)
    for info in part.shards:
        if not find_shards(store, part.prefix, info.sha256):
            made = _predict(store, part, model, recipe, manifest, info)
            store.create_immutable(shard_key(part.prefix, info.sha256, sha256_hex(made)), made)


def _predict(store: Store, part: Part, model: Program, recipe: Recipe, manifest: Manifest, info: ShardInfo) -> bytes:
    ids: list[str] = []
    outputs = []
    for batch_ids, inputs in input_batches(store, recipe, part.dataset, manifest, info, kept=part.kept):
        ids += batch_ids
        outputs.append(model.run(inputs).copy())
    about = {"format": FORMAT, "model_sha256": part.kept.model_sha256, "shard": info.sha256}
    return to_parquet(ids, np.concatenate(outputs), about)


def main() -> None:
    path = Path(sys.argv[1])
    part = parse(Part, json.loads(path.read_text()))
    die_with(part.parent_pid)
    with errors_told(path):
        predict_part(Store(part.location), part)


if __name__ == "__main__":
    main()
