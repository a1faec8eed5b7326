"""What a model scored on each held-out sample, kept as a Parquet file under the digest of its bytes."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.done import find_result, keep_result
from training.config import EvaluateConfig
from training.data.withdrawn import record_of
from training.documents import digest_of, read_document, sha256_hex
from training.errors import DamagedError, MissingError
from training.s3.objectstore import Store

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

SCORING = 2
"""Raise it when this package makes something else of the same model and samples: what was kept is not found then."""
FORMAT = "1"
ABOUT = b"unbroken"
POSITION, ID = "sample", "id"
"""Columns that are not scores."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The held-out samples in the manifest's order."""

    ids: tuple[str, ...]
    scores: Mapping[str, NDArray[Any]]
    """By name, each of shape [samples]: the recipe's metrics, and what else it scores."""
    metrics: Mapping[str, str]
    """The scores that are metrics, and whether a greater ("max") or a smaller ("min") one is better."""
    slices: tuple[str, ...]
    """The scores by whose values samples are told apart."""

    def records(self) -> NDArray[np.int64]:
        """For each sample the number of its record: those of one record are not independent."""
        numbers: dict[str, int] = {}
        return np.array([numbers.setdefault(record_of(one), len(numbers)) for one in self.ids], dtype=np.int64)


def to_parquet(samples: Samples) -> bytes:
    """One row per sample: its position, its id and its scores. The same samples give the same bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {
        POSITION: np.arange(len(samples.ids), dtype=np.int64),
        ID: pa.array(samples.ids, pa.string()),
    }
    about = {"format": FORMAT, "metrics": dict(samples.metrics), "slices": samples.slices}
    table = pa.table(columns | dict(samples.scores)).replace_schema_metadata({ABOUT: json.dumps(about).encode()})
    out = io.BytesIO()
    pq.write_table(table, out, compression="zstd", write_page_checksum=True)
    return out.getvalue()


def from_parquet(data: bytes) -> Samples:
    """The inverse. Raises `DamagedError` if it is none, or of another format."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(io.BytesIO(data), page_checksum_verification=True)
        about = read_document(table.schema.metadata[ABOUT], what="its description")
        if about["format"] != FORMAT:
            raise DamagedError(f"scores of format {about['format']!r}, which this release cannot read")
        return Samples(
            ids=tuple(table.column(ID).to_pylist()),
            scores={name: table.column(name).to_numpy() for name in table.column_names if name not in (POSITION, ID)},
            metrics=about["metrics"],
            slices=tuple(about["slices"]),
        )
    except (pa.ArrowException, OSError, OverflowError, ValueError, LookupError, TypeError) as error:
        raise DamagedError(f"a file of scores is damaged: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Where scores are."""

    sha256: str
    """Of the Parquet file, which is `runs/KEY/results/SHA256.parquet`."""


def scores_key(run_key: str, sha256: str) -> str:
    return f"runs/{run_key}/results/{sha256}.parquet"


def find_or_score(
    store: Store,
    *,
    run_key: str,
    weights_sha256: str,
    dataset_digest: str,
    config: EvaluateConfig,
    score: Callable[[], Samples],
) -> tuple[str, Samples]:
    """The scores of these weights on these samples, and their digest: as they were kept, else by `score`, and kept.

    They are a function of what is given here alone, whoever asks: the model's own evaluation or, later, a challenger's.
    """
    what = {
        "scoring": SCORING,
        "weights": weights_sha256,
        "dataset": dataset_digest,
        "batch_size": config.batch_size,
        "max_samples": config.max_samples,
    }
    key = f"runs/{run_key}/results/{digest_of(what)}.json"
    known = find_result(store, key, Kept)
    if known is not None:
        try:
            return known.sha256, from_parquet(store.get_proven(scores_key(run_key, known.sha256), sha256=known.sha256))
        except (DamagedError, MissingError) as error:
            log.warning("%s, and the samples are scored again", error)
    samples = score()
    data = to_parquet(samples)
    kept = Kept(sha256=sha256_hex(data))
    store.put_immutable(scores_key(run_key, kept.sha256), data)
    keep_result(store, key, kept)
    return kept.sha256, samples
