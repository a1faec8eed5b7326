"""Whole runs in shards that keep copies in memory, on real ranks: what is lost with some of them, and the same bits."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

from tests.distributed import groups, spread
from tests.distributed.groups import EVERY, Calm, Node, Pause, kill_one_of_two, require_same
from tests.distributed.in_blocks import InBlocks
from tests.distributed.pausing import COPYING, MID_STEP
from training.config import ParallelConfig

COPY_EVERY = 2
PRESET = replace(
    groups.PRESET,
    recipe="tests.distributed.in_blocks:InBlocks",
    launch=replace(groups.PRESET.launch, processes_per_node=4, grace_seconds=100.0),
    parallel=ParallelConfig(shard=2, copy_every_steps=COPY_EVERY),
)
NEWEST = 8
"""The newest copy of whoever dies in the step after the ninth; the newest checkpoint is of step 5."""
zygote, node, calm = groups.fixtures(PRESET, InBlocks(), is_far=True)


def kill(node: Node, num_ranks: int, victim: int, pause: Pause) -> None:
    """A rank, there, once there is a checkpoint."""
    act = spread.kill(node, victim, checkpoint=EVERY)
    node.train(num_ranks, act, pauses={victim: pause}, nodes=2 // num_ranks or 1)


@pytest.mark.parametrize(
    ("before", "lost", "after"),
    [
        pytest.param(2, (1,), 1, id="to one"),
        pytest.param(1, (), 2, id="to two", marks=pytest.mark.slow),
        pytest.param(2, (0,), 4, id="to four"),
    ],
)
def test_whoever_is_lost_alone_takes_no_copy_with_it(
    node: Node, calm: Calm, before: int, lost: tuple[int, ...], after: int
) -> None:
    """As many go on as there are, and as many shards: from what others hold in memory."""
    kill(node, before, before - 1, Pause(MID_STEP, 9))
    node.lose_memory(*lost)
    node.train(after, nodes=2 // after or 1)
    assert node.attempts() == [(before, 0, "start"), (after, NEWEST, "memory")]
    require_same(node, calm)


@pytest.mark.parametrize(
    ("lost", "expected"),
    [
        pytest.param((2,), (4, NEWEST, "memory"), id="one", marks=pytest.mark.slow),
        pytest.param((1, 3), (4, NEWEST, "memory"), id="two"),
        pytest.param((1, 2), (4, EVERY, "checkpoint"), id="two neighbours", marks=pytest.mark.slow),
    ],
)
def test_of_four_shards_each_is_in_the_memory_of_two_nodes(
    node: Node, calm: Calm, lost: tuple[int, ...], expected: tuple[int, int, str]
) -> None:
    node.job = replace(
        node.job, preset=replace(node.job.preset, parallel=ParallelConfig(shard=4, copy_every_steps=COPY_EVERY))
    )
    kill(node, 4, 2, Pause(MID_STEP, 9))
    node.lose_memory(*lost)
    node.train(4)
    assert node.attempts() == [(4, 0, "start"), expected]
    require_same(node, calm)


def test_one_node_is_lost_after_another(node: Node, calm: Calm) -> None:
    """Before there is a new copy: what a group takes up is on two nodes again as it begins."""
    kill(node, 2, 1, Pause(MID_STEP, 9))
    node.lose_memory(1)
    kill(node, 2, 0, Pause(MID_STEP, NEWEST))
    node.lose_memory(0)
    node.train(2)
    assert node.attempts()[-1] == (2, NEWEST, "memory")
    require_same(node, calm)


def test_while_a_copy_is_made_the_one_before_is_whole(node: Node, calm: Calm) -> None:
    """A rank dies before it has written what the other has written; the process alone, as its agent lives on. What is
    newer than where they go on gives way to new copies of that step."""
    node.is_far = False
    node.train(2, partial(kill_one_of_two, victim=1, step=4), pauses={1: Pause(COPYING, 4)})
    assert node.steps_in_memory()[:2] == [4, 2]
    node.train(2, partial(kill_one_of_two, victim=1, step=3), pauses={1: Pause(MID_STEP, 3)})
    assert node.steps_in_memory()[:2] == [2, 2]
    node.train(2)
    assert node.attempts()[-1] == (2, 2, "memory")
    require_same(node, calm)
