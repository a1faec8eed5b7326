"""A run that goes from one mode of training to the other, by its checkpoints."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial

from tests.distributed.groups import Group, Node, Pause
from tests.distributed.pausing import MID_STEP


async def has_checkpoint(node: Node, step: int) -> None:
    """Once the record names one of that step."""
    while [checkpoint.step for checkpoint in node.run.read().checkpoints][-1:] != [step]:
        await asyncio.sleep(0.05)


def train_in_both_modes(node: Node) -> None:
    """With two servers to step 5, without any to step 10, with four to the end: of each group only a checkpoint is
    left."""

    async def stop(group: Group, *, checkpoint: int) -> None:
        await group.paused(0)
        await has_checkpoint(node, checkpoint)
        group.workers.stop()

    node.train(2, partial(stop, checkpoint=5), pauses={0: Pause(MID_STEP, 6)}, servers=2)
    job, served = node.job, node.job.preset
    node.job = replace(job, preset=replace(served, train=replace(served.train, strategy="all_reduce")))
    node.lose_memory(*range(len(node.slots)))
    node.train(1, partial(stop, checkpoint=10), pauses={0: Pause(MID_STEP, 11)})
    assert node.attempts()[-1] == (1, 5, "checkpoint")
    node.job = job
    node.lose_memory(*range(len(node.slots)))
    node.train(3, servers=4)
    assert node.attempts()[-1] == (3, 10, "checkpoint")
