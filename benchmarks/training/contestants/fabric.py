"""Lightning Fabric: its DDP strategy, accumulating under `no_backward_sync`."""

from __future__ import annotations

import os
from collections.abc import Iterator

from lightning.fabric import Fabric

from benchmarks.training.protocol import serve
from benchmarks.training.workload import CLIP_NORM, Workload, optimizer_of


def steps(workload: Workload) -> Iterator[None]:
    fabric = Fabric(accelerator="cpu", strategy="ddp", devices=1, num_nodes=int(os.environ["WORLD_SIZE"]))
    fabric.launch()
    module = workload.model()
    model, optimizer = fabric.setup(module, optimizer_of(module))
    for microbatches in workload.steps():
        optimizer.zero_grad()
        for number, part in enumerate(microbatches):
            with fabric.no_backward_sync(model, enabled=number < len(microbatches) - 1):
                fabric.backward(model(part) / len(microbatches))
        fabric.clip_gradients(model, optimizer, max_norm=CLIP_NORM)
        optimizer.step()
        yield


if __name__ == "__main__":
    serve(steps)
