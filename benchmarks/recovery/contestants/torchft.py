"""A replica under torchft, which takes its state from another one: `python contestants/torchft.py BYTES ADDRESS`."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not listed
from torchft import DistributedDataParallel, Manager, Optimizer, ProcessGroupGloo

from benchmarks.recovery.contestants.line import print_step
from benchmarks.recovery.workload import (
    DETECTION_SECONDS,
    MICROBATCHES,
    SAMPLES_PER_MICROBATCH,
    WIDTH,
    Model,
    loss_of,
    optimizer_of,
)

PATIENCE = timedelta(seconds=30)


def main() -> None:
    num_bytes, address = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    store = TCPStore(address, 0, is_master=True, wait_for_workers=False)
    torch.manual_seed(0)
    model = Model(num_bytes)
    optimizer = optimizer_of(model)

    def load(state: dict[str, dict[str, object]]) -> None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    manager = Manager(
        pg=ProcessGroupGloo(timeout=timedelta(seconds=DETECTION_SECONDS)),
        load_state_dict=load,
        state_dict=lambda: {"model": model.state_dict(), "optimizer": optimizer.state_dict()},
        min_replica_size=2,
        replica_id=f"replica{address}",
        timeout=timedelta(seconds=DETECTION_SECONDS),
        quorum_timeout=PATIENCE,
        connect_timeout=PATIENCE,
        rank=0,
        world_size=1,
        store_addr=address,
        store_port=store.port,
        hostname=address,
    )
    replicas, guarded = DistributedDataParallel(manager, model), Optimizer(manager, optimizer)
    while True:
        before = manager.current_step()
        torch.manual_seed(before * 7 + os.getpid())
        guarded.zero_grad()
        num_ranks = max(1, manager.num_participants())
        loss: Any = loss_of(replicas, torch.randn(MICROBATCHES // num_ranks * SAMPLES_PER_MICROBATCH, WIDTH))
        loss.backward()
        guarded.step()
        if manager.current_step() > before:
            group = str(manager._quorum_id)
            print_step(manager.current_step(), num_ranks=manager.num_participants(), group=group)


if __name__ == "__main__":
    main()
