"""What the bits may depend on besides the run key: named, recorded, and refused if it differs on resumption."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path
from typing import TYPE_CHECKING

from training.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

NUMERICS_VERSION = 5
"""Part of every run key. Raise it whenever a change alters the bits of training (tests/golden says when)."""

THREADS_PER_RANK = 1


def fingerprint() -> dict[str, str]:
    """The environment of this process, by name."""
    import torch

    return {
        "torch": str(torch.__version__),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "threads": str(THREADS_PER_RANK),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "arithmetic": arithmetic(),
    }


def processor(cpuinfo: str | None = None) -> str:
    """The kind of CPU. MKL and oneDNN choose kernels and block sizes by it, also among CPUs of one instruction set."""
    lines = (cpuinfo if cpuinfo is not None else Path("/proc/cpuinfo").read_text()).partition("\n\n")[0].splitlines()
    named = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    parts = [named[name] for name in ("vendor_id", "cpu family", "model") if name in named]
    return " ".join([platform.machine(), *parts])


def arithmetic() -> str:
    """A digest of what a few operations give here, 10 ms: names cannot tell all.

    Two x86 CPUs with AVX512 were seen to take different square roots, and so can one CPU with other settings of MKL.
    """
    import torch
    from torch.nn import functional as F

    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS_PER_RANK)
    x = torch.arange(1, 4097, dtype=torch.float32) / 1000
    square = x.view(64, 64)
    results: list[Tensor] = [op(part) for part in (x, x[:7]) for op in (torch.exp, torch.log, torch.sqrt, torch.tanh)]
    results += [square @ square, torch.softmax(square, 1), F.gelu(square), square.sum()]
    results += [
        F.conv2d(x.view(1, 4, 32, 32), x[:144].view(4, 4, 3, 3)),
        (square.bfloat16() @ square.bfloat16()).float(),
    ]
    torch.set_num_threads(threads)
    return hashlib.sha256(b"".join(result.numpy().tobytes() for result in results)).hexdigest()[:16]


def require_same(recorded: dict[str, str], here: dict[str, str]) -> None:
    """Raises `UserError` naming each entry that differs: going on would give other bits."""
    differing = [
        f"{name}: the run has {recorded.get(name)}, this machine {here.get(name)}"
        for name in sorted({*recorded, *here})
        if recorded.get(name) != here.get(name)
    ]
    if differing:
        raise UserError(
            "this run was begun in another environment, where the same arithmetic gives other bits ("
            + "; ".join(differing)
            + "). Go on there, or begin anew here with --fresh"
        )
