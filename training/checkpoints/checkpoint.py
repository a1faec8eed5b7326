"""What a checkpoint is, and how it is read: only what the run record names, every byte checked. Imports no torch.

runs/KEY/GENERATION/checkpoints/STEP-TOKEN/: part-R.safetensors for each rank, and manifest.json. Nothing there exists,
as far as any reader is concerned, until the run record names the manifest's digest (docs/protocols.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from training.checkpoints.trust import require_signed_checkpoint
from training.documents import parse, read_document
from training.errors import DamagedError, MissingError, UntrustedError
from training.runs.record import CheckpointRef, InitialWeights, Record, RunRecord, generation_prefix, with_quarantined
from training.s3.objectstore import Store

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Slice:
    """The piece of a tensor that one part holds: from `start`, of `shape`."""

    part: int
    start: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """A tensor's global dtype and shape, and where its pieces are: so any layout can load it."""

    dtype: str
    shape: tuple[int, ...]
    slices: tuple[Slice, ...]


@dataclass(frozen=True, kw_only=True)
class PartInfo:
    """One object of the checkpoint."""

    name: str
    sha256: str
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class CheckpointManifest:
    """What a checkpoint holds. The record that names its digest signs it (training.checkpoints.trust)."""

    step: int
    tensors: Mapping[str, TensorInfo]
    parts: tuple[PartInfo, ...]
    format: int = FORMAT


def folder(prefix: str, checkpoint_step: int, token: int) -> str:
    return f"{prefix}checkpoints/{checkpoint_step:08d}-{token:06d}/"


def load_manifest(store: Store, prefix: str, reference: CheckpointRef) -> CheckpointManifest:
    """What a proven checkpoint holds. Raises `DamagedError`; `UntrustedError` before anything of it is read."""
    key = folder(prefix, reference.step, reference.token) + "manifest.json"
    require_signed_checkpoint(prefix, reference, name=store.location.uri(key))
    try:
        data = store.get_proven(key, sha256=reference.sha256)
    except MissingError as error:
        raise DamagedError(f"checkpoint {reference.step} is not whole: {error}") from error
    manifest = parse(CheckpointManifest, read_document(data, what=f"checkpoint {reference.step}"))
    if manifest.format != FORMAT:
        raise DamagedError(f"checkpoint {reference.step} has format {manifest.format}, which this release cannot read")
    return manifest


def load_checkpoint(store: Store, prefix: str, reference: CheckpointRef) -> dict[str, Tensor]:
    """Every tensor of a proven checkpoint, each object checked. Raises `DamagedError` naming the object, and
    `UntrustedError`."""
    import safetensors.torch

    base = folder(prefix, reference.step, reference.token)
    manifest = load_manifest(store, prefix, reference)
    try:
        tensors: dict[str, Tensor] = {}
        for part in manifest.parts:
            tensors.update(safetensors.torch.load(store.get_proven(base + part.name, sha256=part.sha256)))
    except MissingError as error:
        raise DamagedError(f"checkpoint {reference.step} is not whole: {error}") from error
    except safetensors.SafetensorError as error:
        raise DamagedError(f"checkpoint {reference.step} is damaged: {error}") from error
    if set(tensors) != set(manifest.tensors):
        raise DamagedError(f"checkpoint {reference.step} is damaged: its parts do not hold what its manifest names")
    return tensors


def load_initial(store: Store, initial: InitialWeights) -> dict[str, Tensor]:
    """The weights that another run ended with. Raises `DamagedError` if they are not what they were."""
    from training.checkpoints.state import tensors_sha256

    prefix = generation_prefix(initial.run_key, initial.generation)
    tensors = load_checkpoint(store, prefix, initial.checkpoint)
    weights = {name: tensor for name, tensor in tensors.items() if name.startswith("model.")}
    if tensors_sha256(weights) != initial.weights_sha256:
        raise DamagedError(f"checkpoint {initial.checkpoint.step} of run {initial.run_key[:12]} holds other weights")
    return weights


def newest_proven(run: RunRecord, *, token: int) -> tuple[CheckpointRef, dict[str, Tensor]] | None:
    """The newest checkpoint that is whole; damaged ones are quarantined on the way. None: begin at step 0.

    Raises `UntrustedError` at one that is not signed as it should be: it is not for a rank to begin again without it.
    """
    while True:
        record: Record = run.read()
        if not record.checkpoints:
            return None
        reference = record.checkpoints[-1]
        try:
            return reference, load_checkpoint(run.store, run.prefix(record), reference)
        except UntrustedError:
            raise
        except DamagedError as error:
            reason = str(error)
            run.update(lambda newest: with_quarantined(newest, reference, reason, token=token))  # noqa: B023
