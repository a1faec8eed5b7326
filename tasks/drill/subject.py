"""What a drill was taken for, as two digests: whoever requires a drill compares them with what a model came from."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import training
from training.config import Preset
from training.documents import digest_of, sha256_hex
from training.environment import NUMERICS_VERSION
from training.recipe import Recipe
from training.sources import source_closure_digest


def subject_of(preset: Preset, recipe: Recipe) -> str:
    """The recipe with its source and fields, and the training configuration that decides bits, but for how long and
    on what it trains: a drill has other steps, another seed and a part of the data."""
    determining = preset.determining()
    return digest_of(
        {
            "recipe": preset.recipe,
            "recipe_source": source_closure_digest(recipe),
            "fields": asdict(recipe),
            "numerics_version": NUMERICS_VERSION,
            "train": {name: value for name, value in determining["train"].items() if name != "steps"},
            **({"parallel": determining["parallel"]} if "parallel" in determining else {}),
        }
    )


def code_digest() -> str:
    """Of every source file of the `training` package: recovery is its work."""
    folder = Path(training.__file__).parent
    files = sorted(folder.rglob("*.py"))
    return digest_of({path.relative_to(folder).as_posix(): sha256_hex(path.read_bytes()) for path in files})
