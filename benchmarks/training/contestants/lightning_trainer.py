"""Lightning Trainer: its own loop, in a thread that is let go one step at a time."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any

import lightning
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from benchmarks.training.protocol import serve
from benchmarks.training.workload import CLIP_NORM, Workload, optimizer_of


class Module(lightning.LightningModule):  # type: ignore[misc]  # its types are not here
    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self.model = workload.model()

    def training_step(self, batch: Tensor) -> Tensor:
        loss: Tensor = self.model(batch)
        return loss

    def configure_optimizers(self) -> Any:
        return optimizer_of(self.model)


class Microbatches(IterableDataset[Tensor]):
    def __init__(self, workload: Workload) -> None:
        self._workload = workload

    def __iter__(self) -> Iterator[Tensor]:
        for microbatches in self._workload.steps():
            yield from microbatches


class Pace(lightning.Callback):  # type: ignore[misc]  # its types are not here
    """Waits before the first microbatch of a step, and tells when its last one is done."""

    def __init__(self, num_microbatches: int) -> None:
        self._num_microbatches = num_microbatches
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % self._num_microbatches == 0:
            self.go.acquire()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % self._num_microbatches == 0:
            self.done.release()


def steps(workload: Workload) -> Iterator[None]:
    pace = Pace(len(workload.owned))
    trainer = lightning.Trainer(
        accelerator="cpu",
        strategy="ddp",
        devices=1,
        num_nodes=int(os.environ["WORLD_SIZE"]),
        accumulate_grad_batches=len(workload.owned),
        gradient_clip_val=CLIP_NORM,
        callbacks=[pace],
        max_steps=10**6,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    loader = DataLoader(Microbatches(workload), batch_size=None)
    fit = threading.Thread(target=trainer.fit, args=(Module(workload), loader), daemon=True)
    fit.start()
    while True:
        pace.go.release()
        pace.done.acquire()
        yield


if __name__ == "__main__":
    serve(steps)
