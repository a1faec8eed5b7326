"""A rank of plain DDP under torchrun, with checkpoints in memory: `torchrun … contestants/torchrun.py BYTES FOLDER`."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.recovery.contestants.line import print_step
from benchmarks.recovery.workload import (
    CHECKPOINT_EVERY_STEPS,
    DETECTION_SECONDS,
    MICROBATCHES,
    SAMPLES_PER_MICROBATCH,
    WIDTH,
    Model,
    loss_of,
    optimizer_of,
)

FIRST_STEP_SECONDS = 30.0


def main() -> None:
    num_bytes, checkpoint = int(sys.argv[1]), Path(sys.argv[2]) / "checkpoint.pt"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=FIRST_STEP_SECONDS))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = Model(num_bytes)
    optimizer = optimizer_of(model)
    step = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
    replicas = DistributedDataParallel(model)
    begun = step
    group = torch.tensor([time.time_ns()])
    dist.broadcast(group, 0)
    while True:
        torch.manual_seed(step * world_size + rank)
        optimizer.zero_grad()
        loss: Any = loss_of(replicas, torch.randn(MICROBATCHES // world_size * SAMPLES_PER_MICROBATCH, WIDTH))
        loss.backward()
        optimizer.step()
        step += 1
        print_step(step, num_ranks=world_size, group=str(group.item()))
        if step == begun + 1:
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=DETECTION_SECONDS))
        if rank == 0 and step % CHECKPOINT_EVERY_STEPS == 0:
            new = checkpoint.with_suffix(".new")
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, new)
            new.replace(checkpoint)


if __name__ == "__main__":
    main()
