"""A replica under torchft, which takes its state from another one: `python contestants/torchft.py BYTES ADDRESS`."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not listed
from torchft import Manager, Optimizer, ProcessGroupGloo

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
    socket.gethostname = lambda: address  # where others fetch the state: no name server knows this host
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
    guarded = Optimizer(manager, optimizer)
    trained = [p for p in model.parameters() if p.requires_grad]
    while True:
        before = manager.current_step()
        torch.manual_seed(before * 7 + os.getpid())
        guarded.zero_grad()
        num_ranks = max(1, manager.num_participants())
        loss: Any = loss_of(model, torch.randn(MICROBATCHES // num_ranks * SAMPLES_PER_MICROBATCH, WIDTH))
        loss.backward()
        _average_gradients(manager, trained)
        guarded.step()
        if manager.current_step() > before:
            group = str(manager._quorum_id)
            print_step(manager.current_step(), num_ranks=manager.num_participants(), group=group)


def _average_gradients(manager: Any, parameters: Sequence[Tensor]) -> None:
    """Its own DistributedDataParallel ends the process when a peer is lost: an assertion in its hook fails (0.2.0)."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    manager.allreduce(flat).wait()
    for gradient, mean in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


if __name__ == "__main__":
    main()
