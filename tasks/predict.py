"""Batch prediction: a registered model over every shard of a dataset version, each once, whatever dies on the way."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.lifecycle import model_file
from tasks.policy import stage_options
from tasks.prediction.kept import (
    Predictions,
    complete,
    find_shards,
    manifest_key,
    predicted,
    predictions_prefix,
    shards_of,
    whole_shards,
)
from tasks.prediction.sharing import Part, predict_shared
from tasks.prediction.wanted import Wanted, preset_of
from tasks.stack import open_stack
from training.data.manifest import load_manifest
from training.documents import sealed
from training.errors import InfrastructureError, UserError
from training.s3.objectstore import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """What came of it, and how much had to be done."""

    model: str
    version: str
    dataset: str
    dataset_digest: str
    num_samples: int
    num_shards: int
    num_shards_found: int
    """Finished before."""
    manifest: str
    """Its URI."""


@task(name="predict", cache_policy=NO_CACHE, **{**stage_options(timeout_seconds=24 * 3600), "persist_result": False})
def predict(wanted: Wanted, *, processes: int = 2) -> Predicted:
    """Predict what is missing, by so many processes of this machine, and write the manifest once nothing is.

    Others, here and on other machines, may be at the same: they share the shards through the store alone.
    Raises `UserError` if data and model do not fit, `DamagedError` naming a model file or shard, `InfrastructureError`
    if a process died.
    """
    if processes < 1:
        raise UserError(f"processes = {processes}: one is the least")
    _, store = open_stack()
    kept = model_file.find(store, wanted.model, wanted.version)
    prefix = predictions_prefix(kept.model, model_sha256=kept.model_sha256, dataset_digest=wanted.dataset_digest)
    known = complete(store, prefix)
    if known is not None:
        return _told(store, prefix, wanted, known, num_found=_num_shards(known))
    manifest = load_manifest(store, wanted.dataset, wanted.dataset_digest)
    shards = shards_of(manifest)
    done = whole_shards(store, prefix)
    missing = [info for sha256, info in shards.items() if sha256 not in done]
    if missing:
        log.info("%d of %d shards are to be predicted", len(missing), len(shards))
        part = Part(
            kept=kept,
            preset=preset_of(store, kept),
            dataset=wanted.dataset,
            dataset_digest=wanted.dataset_digest,
            prefix=prefix,
            shards=tuple(missing),
            location=store.location,
        )
        predict_shared(part, processes)
        done |= find_shards(store, prefix)
    lost = [sha256 for sha256 in shards if sha256 not in done]
    if lost:
        raise InfrastructureError(f"predictions of shard {lost[0][:12]} were deleted meanwhile: run it again")
    made = Predictions(
        model=kept.model,
        version=kept.version,
        run_key=kept.run_key,
        model_sha256=kept.model_sha256,
        dataset=wanted.dataset,
        dataset_digest=wanted.dataset_digest,
        splits=predicted(manifest, done),
    )
    store.create_immutable(manifest_key(prefix), sealed("result", asdict(made)))
    return _told(store, prefix, wanted, made, num_found=len(shards) - len(missing))


def _num_shards(predictions: Predictions) -> int:
    return len({shard.shard for shards in predictions.splits.values() for shard in shards})


def _told(store: Store, prefix: str, wanted: Wanted, made: Predictions, *, num_found: int) -> Predicted:
    result = Predicted(
        model=wanted.model,
        version=wanted.version,
        dataset=wanted.dataset,
        dataset_digest=wanted.dataset_digest,
        num_samples=made.num_samples,
        num_shards=_num_shards(made),
        num_shards_found=num_found,
        manifest=store.location.uri(manifest_key(prefix)),
    )
    log.info(
        "%d samples in %d shards, %d of them found done: %s",
        result.num_samples,
        result.num_shards,
        num_found,
        result.manifest,
    )
    return result
