"""From a shard to what a model takes, by the recipe that it was trained with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.lifecycle.model_file import KeptVersion
from training.data.cache import ShardCache, fetch_from
from training.data.manifest import Manifest, ShardInfo
from training.data.reader import Reader
from training.errors import UserError
from training.recipe import Recipe, maybe_decode
from training.s3.objectstore import Store

if TYPE_CHECKING:
    from numpy.typing import NDArray

BATCH_SIZE = 64
"""Samples that go through the model together: always as many, since another number may give other bits."""


def input_batches(
    store: Store, recipe: Recipe, dataset: str, manifest: Manifest, info: ShardInfo, *, kept: KeptVersion
) -> Iterator[tuple[Sequence[str], NDArray[Any]]]:
    """A shard's samples in their order: their ids, and the model's input. Nothing is left to chance.

    Raises `DamagedError` naming the shard, `DeterministicError` where the recipe fails, and `UserError` if what it
    gives is not what the model's signature takes.
    """
    import torch

    from training.arithmetic.objective import recipe_errors

    cache = ShardCache(fetch_from(store, dataset), (info,))
    with closing(Reader(cache, (info.num_samples,), manifest.fields, maybe_decode=maybe_decode(recipe))) as reader:
        for rows in reader.read_all(batch_size=BATCH_SIZE):
            batch = {name: torch.from_numpy(array).clone() for name, array in rows.fields.items()}  # aligned by torch
            with recipe_errors(f"inputs() on dataset {dataset!r} (of {', '.join(rows.fields)})", rows.ids):
                inputs = np.ascontiguousarray(recipe.inputs(batch).numpy())
            _require_fit(inputs, len(rows.ids), dataset, kept)
            yield rows.ids, inputs


def _require_fit(inputs: NDArray[Any], num_samples: int, dataset: str, kept: KeptVersion) -> None:
    wanted = kept.signature.inputs
    shape = (num_samples, *wanted.shape[1:])
    fits = len(inputs.shape) == len(shape) and all(w in (-1, s) for s, w in zip(inputs.shape, shape, strict=True))
    if not fits or inputs.dtype != wanted.dtype:
        raise UserError(
            f"dataset {dataset!r} does not fit model {kept.model!r} version {kept.version}, which takes {wanted.dtype}"
            f" of shape {list(wanted.shape)}: its samples give {inputs.dtype} of shape {list(inputs.shape)}"
        )
