"""A whole run in each layout of the table, on real ranks: one is killed, and it goes on with other replicas."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import pytest

from tests.distributed import groups
from tests.distributed.groups import ENTRY, Calm, Node, Pause
from tests.distributed.in_tensors import InTensors
from tests.distributed.layouts import Case
from tests.distributed.pausing import MID_STEP, UPDATING
from tests.distributed.spread import kill
from tests.distributed.test_layouts import ALL
from tests.faults.evidence import keep_row
from training.cluster.zygote import Zygote
from training.config import ParallelConfig
from training.layout import Layout
from training.memory.slots import create_slots
from training.s3.objectstore import Store

STEPS = 50
EVERY = 10
MOST_RANKS = 8
PRESET = replace(
    groups.PRESET,
    recipe="tests.distributed.in_tensors:InTensors",
    train=replace(
        groups.PRESET.train,
        steps=STEPS,
        batch_size=24,
        virtual_workers=8,
        checkpoint_every_steps=EVERY,
        validate_every_steps=EVERY,
    ),
    launch=replace(groups.PRESET.launch, processes_per_node=MOST_RANKS),
)
SEED = 11


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with closing(Zygote(PRESET, entry=ENTRY)) as running:
        yield running


@pytest.fixture(scope="module")
def alone() -> Calm:
    return groups.calm(preset=PRESET, recipe=InTensors(), steps=STEPS)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_a_rank_is_killed_and_there_are_other_replicas_afterwards(
    store: Store, zygote: Zygote, alone: Calm, case: Case
) -> None:
    """Twice: at a step by chance, of a rank by chance. Exact layouts end with the bits of one process; those with
    matrices in parts with those of a run in as many parts that nothing happens to."""
    num_ranks, chance = case.layout.num_ranks, random.Random(f"{SEED} {case}")
    calm = alone if case.is_exact else _undisturbed(store, zygote, case)
    moments = [chance.randrange(EVERY + 1, 2 * EVERY), chance.randrange(3 * EVERY + 1, 4 * EVERY)]
    sizes = [num_ranks, _num_ranks_after(case.layout), num_ranks]
    place = UPDATING if case.layout.pipeline > 1 else MID_STEP  # stages in the midst read no samples
    with closing(_node(store, zygote, case)) as node:
        for size, step in zip(sizes, moments, strict=False):
            victim = chance.randrange(size)
            act = kill(node, victim=victim, checkpoint=step // EVERY * EVERY)
            nodes = max(1, num_ranks // size)  # all but one of them are away
            group = node.train(size, act, pauses={victim: Pause(place, step)}, nodes=nodes)
            assert group.codes()[victim] == -signal.SIGKILL
        assert node.train(num_ranks).codes() == [0] * num_ranks
        attempts, found = node.attempts(), _end_of(node)
    assert found == calm
    assert [size for size, *_ in attempts] == sizes
    row = {"layout": str(case), "killed_in_step": [step + 1 for step in moments], "attempts": attempts}
    keep_row("killed-layouts", {**row, "seed": SEED, "state_sha256": found[0]}, key="layout")


def _num_ranks_after(layout: Layout) -> int:
    """With twice as many replicas, or with half of them; or, of one, in half as many stages."""
    return layout.num_ranks * 2 if layout.num_ranks < MOST_RANKS else layout.num_ranks // 2


def _undisturbed(store: Store, zygote: Zygote, case: Case) -> Calm:
    alone = replace(case, layout=Layout(tensor=case.layout.tensor))
    with closing(
        _node(Store(replace(store.location, prefix=f"{store.location.prefix}undisturbed/")), zygote, alone)
    ) as node:
        node.train(alone.layout.num_ranks)
        return _end_of(node)


def _node(store: Store, zygote: Zygote, case: Case) -> Node:
    """With memory for as many ranks as there may be."""
    layout = case.layout
    schedule = case.maybe_schedule or "1f1b"
    parallel = ParallelConfig(shard=layout.shard, pipeline=layout.pipeline, tensor=layout.tensor, schedule=schedule)
    node = groups.make_node(store, zygote, preset=replace(PRESET, parallel=parallel), recipe=InTensors())
    node.slots += [create_slots() for _ in range(MOST_RANKS - len(node.slots))]
    return node


def _end_of(node: Node) -> Calm:
    result = node.run.read().result
    assert result is not None
    assert result.step == STEPS
    return result.state_sha256, node.told()
