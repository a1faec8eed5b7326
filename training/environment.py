"""What the bits may depend on besides the run key: named, recorded, and refused if it differs on resumption."""

from __future__ import annotations

import platform

from training.errors import UserError

NUMERICS_VERSION = 4
"""Part of every run key. Raise it whenever a change alters the bits of training (tests/golden says when)."""

THREADS_PER_RANK = 1


def fingerprint() -> dict[str, str]:
    """The environment of this process, by name."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        "torch": str(torch.__version__),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "threads": str(THREADS_PER_RANK),
        "device": device,
    }


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
