"""Scoring the held-out samples: the same bits, however many processes share the work.

The samples are cut into batches by their number alone. Each batch is scored by one process, in one thread and in memory
that begins at the same alignment; the scores are put together in the order of the samples.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.evaluation.samples import ID, POSITION, Samples, from_parquet
from tasks.models import load_model
from tasks.parts import run_parts
from training.config import Preset
from training.data.manifest import load_manifest
from training.data.opening import open_reader
from training.errors import DeterministicError, UserError
from training.recipe import Recipe, load_recipe
from training.s3.objectstore import Store, StoreLocation

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

SCORES = ".parquet"
"""What a process leaves beside the file that tells it its part."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one of several processes is told, as a JSON document without secrets."""

    preset: Preset
    dataset_digest: str
    run_key: str
    location: StoreLocation
    rank: int
    world_size: int
    parent_pid: int


def score_samples(store: Store, preset: Preset, dataset_digest: str, run_key: str) -> Samples:
    """The recipe's scores of the held-out samples by a finished run's model, by `launch.evaluate_processes` processes.

    Raises `UserError` or `DeterministicError` for what the recipe scores wrongly, `DamagedError` for damaged shards or
    weights, `InfrastructureError` if a process died.
    """
    count = preset.launch.evaluate_processes
    if count == 1:
        return score_part(store, preset, dataset_digest, run_key, rank=0, world_size=1)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{rank}.json" for rank in range(count)]
        for rank, path in enumerate(paths):
            part = Part(
                preset=preset,
                dataset_digest=dataset_digest,
                run_key=run_key,
                location=store.location,
                rank=rank,
                world_size=count,
                parent_pid=os.getpid(),
            )
            path.write_text(json.dumps(asdict(part)))
        run_parts("tasks.evaluation.part", paths, what="score the held-out samples")
        return joined([from_parquet(path.with_suffix(SCORES).read_bytes()) for path in paths])


def score_part(
    store: Store, preset: Preset, dataset_digest: str, run_key: str, *, rank: int, world_size: int
) -> Samples:
    """What process `rank` of `world_size` has to score: some batches in a row, or none."""
    import torch

    from training.arithmetic.objective import recipe_errors
    from training.arithmetic.reduce import owned_range

    torch.set_num_threads(1)  # more threads give other bits
    recipe, config = load_recipe(preset), preset.evaluate
    module = load_model(store, recipe, run_key)
    manifest = load_manifest(store, preset.data.name, dataset_digest)
    ids: list[str] = []
    found: list[Mapping[str, NDArray[Any]]] = []
    slices: tuple[str, ...] = ()
    with closing(open_reader(store, preset, recipe, manifest, "test")) as reader, torch.inference_mode():
        num_samples = min(len(reader), config.max_samples or len(reader))
        mine = owned_range(rank, world_size, -(-num_samples // config.batch_size))
        first, stop = mine.start * config.batch_size, min(mine.stop * config.batch_size, num_samples)
        for rows in reader.read_all(batch_size=config.batch_size, first=first, num_samples=stop - first):
            batch = {name: torch.from_numpy(array).clone() for name, array in rows.fields.items()}  # aligned by torch
            with recipe_errors("scores() on held-out samples"):
                scores = recipe.scores(module, batch)
            slices = slices_of(recipe, scores)
            ids += rows.ids
            found.append(_checked(recipe, scores, ids[-len(rows.ids) :]))
    names = found[0] if found else {}
    return Samples(
        ids=tuple(ids),
        scores={name: np.concatenate([part[name] for part in found]) for name in names},
        metrics=recipe.metrics,
        slices=slices,
    )


def joined(parts: Sequence[Samples]) -> Samples:
    """The parts of all processes, in their order, as one."""
    some = [part for part in parts if part.ids]  # a process without a batch does not know the scores' names
    return Samples(
        ids=tuple(one for part in some for one in part.ids),
        scores={name: np.concatenate([part.scores[name] for part in some]) for name in some[0].scores},
        metrics=some[0].metrics,
        slices=some[0].slices,
    )


def slices_of(recipe: Recipe, scores: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The scores by whose values samples are told apart: those the recipe names, else `label` if it is a class."""
    if recipe.slices is not None:
        return recipe.slices
    return ("label",) if "label" in scores and not scores["label"].is_floating_point() else ()


def _checked(recipe: Recipe, scores: Mapping[str, Tensor], ids: list[str]) -> dict[str, NDArray[Any]]:
    """Raises `UserError` for scores that are missing or of another shape, `DeterministicError` naming a sample whose
    metric is not finite."""
    missing = {*recipe.metrics, *slices_of(recipe, scores)} - set(scores)
    if missing:
        raise UserError(f"the recipe's scores() lacks {', '.join(sorted(missing))}, named in `metrics` or `slices`")
    for name, score in scores.items():
        if name in (POSITION, ID):
            raise UserError(f"the recipe's scores() gives {name!r}, which names a column of ours: call it otherwise")
        if score.shape != (len(ids),):
            raise UserError(
                f"the recipe's scores() gives {name!r} of shape {list(score.shape)} for {len(ids)} samples: one number"
                " for each is needed"
            )
    for name in slices_of(recipe, scores):
        if scores[name].is_floating_point():
            raise UserError(
                f"the recipe's `slices` names {name!r}, which scores() gives as {scores[name].dtype}: whole"
                " numbers are needed"
            )
    for name in recipe.metrics:
        wrong = (~scores[name].isfinite()).nonzero()
        if len(wrong):
            place = int(wrong[0])
            raise DeterministicError(f"sample {ids[place]}: the recipe's {name!r} is {float(scores[name][place])}")
    return {name: score.numpy() for name, score in scores.items()}
