"""A finished run's model, read back and checked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from training.errors import DamagedError, UserError
from training.recipe import Recipe
from training.runs.record import RunRecord
from training.s3.objectstore import Store

if TYPE_CHECKING:
    from torch import nn


def load_model(store: Store, recipe: Recipe, run_key: str) -> nn.Module:
    """The finished run's model, in evaluation mode. Raises `DamagedError` if its bytes are not as recorded, and
    `UntrustedError`."""
    from training.checkpoints.checkpoint import load_checkpoint
    from training.checkpoints.state import tensors_sha256
    from training.checkpoints.trust import trusted_result

    run = RunRecord(store, run_key)
    record = run.read()
    if record.result is None:
        raise UserError(f"run {run_key[:12]} is not finished: run the train stage first")
    result = trusted_result(run, record)
    tensors = load_checkpoint(store, run.prefix(record), result.checkpoint)
    weights = {name: tensor for name, tensor in tensors.items() if name.startswith("model.")}
    if tensors_sha256(weights) != result.weights_sha256:
        raise DamagedError(f"run {run_key[:12]}: the checkpoint's weights are not those of the result")
    model = recipe.model()
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in weights.items()})
    return model.eval()
