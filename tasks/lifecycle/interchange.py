"""A version's weights as a safetensors file, with a numerical check: what others load is what was registered."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError

from tasks.lifecycle import model_file, program_file
from tasks.lifecycle.model_file import KeptVersion
from tasks.prediction.inputs import input_batches
from tasks.prediction.wanted import preset_of
from tasks.serving import program
from training.config import Preset
from training.data.manifest import load_manifest
from training.errors import InfrastructureError, UserError
from training.recipe import Recipe, load_recipe
from training.s3.objectstore import Store

EQUAL = "equal bits"
MAX_SHARE = 1e-5
"""Of the largest output: how far the outputs of the recipe's model may be from those of the registered file."""

Array = np.ndarray[Any, Any]
Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class _Sample:
    """Some held-out samples, and what the registered file gives for them."""

    inputs: Array
    outputs: Array

    def judge(self, recipe: Recipe, weights: Weights) -> str:
        """How the outputs of the recipe's model with these weights compare. Raises `UserError` if they differ by more
        than `MAX_SHARE`, or if the weights do not fit the recipe."""
        module = recipe.model()
        try:
            module.load_state_dict(dict(weights))
        except RuntimeError as error:
            raise UserError(f"the weights do not fit the recipe's model: {error}") from error
        with torch.inference_mode():
            found: Array = module.eval()(torch.from_numpy(self.inputs)).numpy()
        if found.tobytes() == self.outputs.tobytes():
            return EQUAL
        bound = MAX_SHARE * float(np.abs(self.outputs).max())
        if not (found.shape == self.outputs.shape and (np.abs(found - self.outputs) <= bound).all()):
            raise UserError(
                "the recipe's model with these weights does not give what the registered model file gives, within"
                f" {MAX_SHARE:g} of the largest output: is the recipe's model the one that was registered?"
            )
        return f"within {MAX_SHARE:g} of the largest"


def export_weights(store: Store, kept: KeptVersion, path: Path, *, force: bool = False) -> dict[str, str]:
    """Write a version's weights and buffers under their names in the recipe's model; returns the file's metadata.

    The file comes into being whole, and checked: read back, its weights equal the registered ones bit for bit, and the
    recipe's model with them gives the outputs of the registered file on held-out samples. Raises `UserError` if the
    file exists (unless `force`) or the recipe's model is another one, `DamagedError` for a damaged model file, and
    `InfrastructureError` if the disk does not take it, or gives other bytes back.
    """
    data = model_file.prove(store, kept)
    program.prepare()
    model = program.load(data, version=kept.version, sha256=kept.model_sha256, signature=kept.signature)
    weights = {
        name: tensor.detach().clone()
        for name, tensor in torch.export.load(io.BytesIO(program_file.harmless(data))).state_dict.items()
    }
    preset = preset_of(store, kept)
    recipe = load_recipe(preset)
    inputs = _held_out(store, kept, preset, recipe)
    sample = _Sample(inputs=inputs, outputs=model.run(inputs))
    about = {
        "format": "pt",
        "model": kept.model,
        "version": kept.version,
        "model_sha256": kept.model_sha256,
        "weights_sha256": kept.weights_sha256,
        "recipe": preset.recipe,
        "run": kept.run_key,
        "dataset": kept.dataset_digest,
        "outputs": sample.judge(recipe, weights),
        "num_samples_compared": str(len(inputs)),
    }
    content = safetensors.torch.save(weights, metadata=about)
    with _written(path, content, force=force) as written:
        _require_same(written, weights, about)
        sample.judge(recipe, safetensors.torch.load_file(written))
    return about


def require_free(path: Path, *, force: bool) -> None:
    """Raises `UserError` if a file cannot come to be there, or is there already and is not to be replaced."""
    if not path.name or not path.parent.is_dir():
        raise UserError(f"--to {str(path)!r}: name a file in a folder that is there")
    if path.is_dir():
        raise UserError(f"--to {str(path)!r} is a folder: name a file")
    if os.path.lexists(path) and not force:
        raise UserError(f"{path} exists: name a new file, or give --force to replace it")


def _held_out(store: Store, kept: KeptVersion, preset: Preset, recipe: Recipe) -> Array:
    """The model's input for the first held-out samples of its own dataset version."""
    name = preset.data.name
    manifest = load_manifest(store, name, kept.dataset_digest)
    _, inputs = next(input_batches(store, recipe, name, manifest, manifest.splits["test"][0], kept=kept))
    return inputs


@contextmanager
def _written(path: Path, content: bytes, *, force: bool) -> Iterator[Path]:
    """The content in a file beside `path`, which takes its place at the end, or is gone if something went wrong."""
    temporary: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        yield temporary
        if force:
            temporary.replace(path)
        else:
            os.link(temporary, path)  # which never replaces one that came meanwhile
    except FileExistsError as error:
        raise UserError(f"{path} exists: name a new file, or give --force to replace it") from error
    except OSError as error:
        raise InfrastructureError(f"cannot write {path}: {error.strerror}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _require_same(path: Path, weights: Weights, about: Mapping[str, str]) -> None:
    """Raises `InfrastructureError` if the file does not hold just these, bit for bit."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            is_same = file.metadata() == about and found.keys() == weights.keys()
    except SafetensorError as error:
        raise InfrastructureError(f"{path} was read back damaged: {error}") from error
    if not (is_same and all(_bits(found[name]) == _bits(weights[name]) for name in weights)):
        raise InfrastructureError(f"{path} was read back with other bytes than were written")


def _bits(tensor: torch.Tensor) -> tuple[str, tuple[int, ...], bytes]:
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return str(tensor.dtype), tuple(tensor.shape), flat.numpy().tobytes()
