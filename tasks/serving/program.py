"""An exported program, loaded and tried: the one place of serving that knows torch."""

from __future__ import annotations

import io
import logging
from typing import Any

import numpy as np
import torch

from tasks.lifecycle.model_file import Signature, Tensor
from tasks.lifecycle.program_file import harmless
from training.documents import sha256_hex
from training.errors import DamagedError

WARM_ROWS = (1, 2)


def prepare() -> None:
    """This process for loading and running programs: with one thread, since replicas share the cores."""
    torch.set_num_threads(1)
    logging.getLogger("torch.export").setLevel(logging.ERROR)  # it warns, with a traceback, of what it raises too


class Program:
    """Rows in, rows out."""

    def __init__(self, version: str, signature: Signature, module: torch.nn.Module) -> None:
        self.version = version
        self.signature = signature
        self._module = module

    @torch.inference_mode()
    def run(self, inputs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """One row out for each row in."""
        outputs = self._module(torch.from_numpy(inputs))
        made: np.ndarray[Any, Any] = outputs.numpy()
        return made


def load(data: bytes, *, version: str, sha256: str, signature: Signature) -> Program:
    """Loaded, and warm. Raises `DamagedError`, before torch sees a byte, if these are not the bytes that were kept; or
    if they are no program, one that would do more than compute, or one of another signature.
    """
    if sha256_hex(data) != sha256:
        raise DamagedError(f"the model file of version {version} is damaged: its sha256 is not {sha256}")
    what = f"the model file of version {version} cannot be run by torch {torch.__version__}"
    try:
        file = io.BytesIO(harmless(data))
    except DamagedError as error:
        raise DamagedError(f"{what}: {error}") from error
    try:
        program = Program(version, signature, torch.export.load(file).module())
        for num_rows in WARM_ROWS:
            _try(program, num_rows)
    except DamagedError:
        raise
    except Exception as error:  # whatever torch makes of a file that is no program of it, or of another release
        first_line = next(iter(str(error).splitlines()), "")
        raise DamagedError(f"{what}: {type(error).__name__}: {first_line}") from error
    return program


def _try(program: Program, num_rows: int) -> None:
    inputs, outputs = program.signature.inputs, program.signature.outputs
    found = program.run(np.zeros(_shape(inputs, num_rows), inputs.dtype))
    wanted = outputs.shape[1:]
    fits = len(found) == num_rows and found.ndim == len(outputs.shape)
    if not (
        fits
        and found.dtype == outputs.dtype
        and all(w in (-1, s) for s, w in zip(found.shape[1:], wanted, strict=True))
    ):
        raise DamagedError(
            f"the model file of version {program.version} gives {found.dtype} {found.shape} for {num_rows} rows,"
            f" its signature says {outputs.dtype} {outputs.shape}"
        )


def _shape(tensor: Tensor, num_rows: int) -> tuple[int, ...]:
    return (num_rows, *(max(size, 1) for size in tensor.shape[1:]))
