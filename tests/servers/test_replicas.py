"""Whatever dies at whatever point of a step: no update that was acknowledged is lost, and none is applied twice."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.servers.planted import PLANTED, Planted
from tests.servers.world import Fault, World

NUM_EVENTS = 112
"""Of an undisturbed world of the usual size and seed 0, about."""
VICTIMS = ("primary 0", "primary 1", "backup 0", "worker 0", "worker 1")
SETTINGS: dict[str, Any] = {"num_shards": 3, "num_replicas": 3, "num_workers": 3, "num_leaves": 8, "num_steps": 3}


@pytest.mark.parametrize("num_replicas", [1, 2, 3])
@pytest.mark.parametrize("num_shards", [1, 2, 4])
@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_the_parameters_are_those_of_one_process(num_workers: int, num_shards: int, num_replicas: int) -> None:
    for seed in range(3):
        World(seed=seed, num_workers=num_workers, num_shards=num_shards, num_replicas=num_replicas).run()


@pytest.mark.parametrize("kind", ["kill", "cut"])
@pytest.mark.parametrize("victim", VICTIMS)
def test_one_is_lost_at_every_point(victim: str, kind: str) -> None:
    for at in range(NUM_EVENTS):
        fault = Fault(at=at, victim=victim, kind=kind)
        world = World(seed=at, faults=[fault])
        world.run()
        assert fault.fired or world.num_events <= at


@pytest.mark.parametrize("victim", [*VICTIMS, "worker 2"])
def test_who_computes_nothing_is_heard_in_every_step_whoever_dies(victim: str) -> None:
    for at in range(0, NUM_EVENTS, 4):
        world = World(seed=at, faults=[Fault(at=at, victim=victim)], num_workers=3, num_speakers=1)
        world.run()
        assert world.history.num_heard >= world.num_steps


def storm(seed: int) -> tuple[Fault, ...]:
    """Faults far enough apart that a replica that is not filled yet is not the last that a shard has."""
    chance = random.Random(seed)
    victims = [*VICTIMS, "primary 2", "worker 2"]
    return tuple(
        Fault(
            at=chance.randrange(60) + 250 * number,
            victim=chance.choice(victims),
            kind=chance.choice(["kill", "cut"]),
            num_workers_after=chance.choice([None, None, 1, 2, 4]),
        )
        for number in range(2)
    )


def test_several_are_lost_one_after_another() -> None:
    num_fired = 0
    for seed in range(60):
        faults = storm(seed)
        World(seed=seed, faults=faults, **SETTINGS).run()
        num_fired += sum(fault.fired for fault in faults)
    assert num_fired > 60


def test_a_shard_whose_last_replica_is_lost_says_so() -> None:
    world = World(seed=0, num_replicas=1, faults=[Fault(at=3, victim="primary 0")])
    with pytest.raises(AssertionError, match="nothing happens"):
        world.run()
    (name,) = world.replicas[0]
    assert world._replica(name).is_lost
    assert not world._replica(world.replicas[1][0]).is_lost


@pytest.mark.parametrize("bug", PLANTED, ids=lambda bug: bug.name)
def test_planted_bugs_are_caught(bug: Planted) -> None:
    classes = bug.classes()
    for seed in range(400):
        faults: tuple[Fault, ...] = storm(seed)[:1]
        if seed % 2 == 0:
            faults = (Fault(at=(seed // 2) % NUM_EVENTS, victim=VICTIMS[seed % 5], kind="kill" if seed % 4 else "cut"),)
        try:
            World(seed=seed, faults=faults, **({} if seed % 2 == 0 else SETTINGS), **classes).run()
        except Exception:  # a crash counts
            return
    pytest.fail(f"{bug.name} survived")
