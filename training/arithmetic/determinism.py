"""Have a process's arithmetic give the same bits each time."""

from __future__ import annotations

import os

import torch

from training import environment


def settle_arithmetic(local_rank: int) -> torch.device:
    """Returns the device to do it on."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS refuses to be deterministic
    torch.set_num_threads(environment.THREADS_PER_RANK)
    torch.use_deterministic_algorithms(True)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
