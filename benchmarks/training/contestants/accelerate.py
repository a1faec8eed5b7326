"""Hugging Face Accelerate: `accumulate`, which skips the reduction until the last microbatch."""

from __future__ import annotations

from collections.abc import Iterator

from accelerate import Accelerator

from benchmarks.training.protocol import serve
from benchmarks.training.workload import CLIP_NORM, Workload, optimizer_of


def steps(workload: Workload) -> Iterator[None]:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=len(workload.owned))
    module = workload.model()
    model, optimizer = accelerator.prepare(module, optimizer_of(module))
    for microbatches in workload.steps():
        for part in microbatches:
            with accelerator.accumulate(model):
                accelerator.backward(model(part))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), CLIP_NORM)
                optimizer.step()
                optimizer.zero_grad()
        yield


if __name__ == "__main__":
    serve(steps)
