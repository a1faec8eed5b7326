"""Whole runs with a part of the state on each rank: what the tests of each way to spread it share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from tests.distributed import groups
from tests.distributed.groups import ENTRY, Act, Group, Node, make_node
from tests.servers.modes import has_checkpoint
from training.cluster.zygote import Zygote
from training.config import ParallelConfig, Preset
from training.memory.slots import create_slots
from training.recipe import Recipe
from training.runs.record import Departure
from training.s3.objectstore import Store

Calm = tuple[str, list[groups.Told]]


def fixtures(preset: Preset, recipe: Recipe) -> tuple[Any, Any, Any]:
    """`zygote`, `node` and `calm`, for up to four ranks; the last is of one process, which has all of the state."""

    @pytest.fixture(scope="module")
    def zygote() -> Iterator[Zygote]:
        with closing(Zygote(preset, entry=ENTRY)) as running:
            yield running

    @pytest.fixture
    def node(store: Store, zygote: Zygote) -> Iterator[Node]:
        with closing(node_of(store, zygote, preset, recipe)) as made:
            yield made

    @pytest.fixture(scope="module")
    def calm() -> Calm:
        return groups.calm(preset=replace(preset, parallel=ParallelConfig()), recipe=recipe)

    return zygote, node, calm


def node_of(store: Store, zygote: Zygote, preset: Preset, recipe: Recipe) -> Node:
    made = make_node(store, zygote, preset=preset, recipe=recipe)
    made.slots.append(create_slots())
    return made


def in_mode(node: Node, parallel: ParallelConfig) -> None:
    """How the groups from here on do it."""
    node.job = replace(node.job, preset=replace(node.job.preset, parallel=parallel))


def kill(node: Node, victim: int, *, checkpoint: int) -> Act:
    """A rank that is paused, once there is that checkpoint."""
    return partial(_kill, node=node, victim=victim, checkpoint=checkpoint)


async def _kill(group: Group, *, node: Node, victim: int, checkpoint: int) -> None:
    await group.paused(victim)
    await has_checkpoint(node, checkpoint)
    group.kill(victim)


def departure_of(
    store: Store, zygote: Zygote, preset: Preset, recipe: Callable[..., Recipe], fails: str, *, num_ranks: int
) -> Departure:
    """Why a run ends of a recipe that `fails` so."""
    preset = replace(preset, hyperparameters={"fails": fails})
    with closing(node_of(store, zygote, preset, recipe(fails=fails))) as node:
        found = node.train(num_ranks).ended.result().maybe_departure
    assert found is not None
    return found
