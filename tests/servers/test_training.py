"""Real ranks with parameter servers in their processes: the bits of exact mode, and of one process, whoever dies."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from tests.distributed import groups
from tests.distributed.groups import Calm, Group, Node, Pause, kill_one_of_two, regroup, require_same
from tests.distributed.pausing import APPLIED, FORMING, MID_STEP, PULLING, PUSHING
from tests.servers.modes import has_checkpoint, train_in_both_modes
from tests.servers.wide import Wide
from tests.unit.tiny import exact_arithmetic, make_trainer
from training.control import EXIT_STOPPED
from training.errors import DeterministicError, UserError
from training.loop import Trainer
from training.servers.arithmetic import TensorState
from training.servers.colocated import Colocated
from training.servers.endpoints import PrimaryLost, Remote
from training.servers.mesh import Mesh

TRAIN = replace(groups.PRESET.train, strategy="parameter_server")
PRESET = replace(groups.PRESET, recipe="tests.servers.wide:Wide", train=TRAIN)
zygote, node, calm = groups.fixtures(PRESET, Wide())
WITH_BACKUPS: dict[str, Any] = {"may_stay": True, "servers": 2, "server_replicas": 2}
FEW = ((1, 2), (2, 1), (4, 4))
"""Ranks and servers; the other numbers are slow."""


def test_a_parameter_that_cannot_be_cut_in_place_is_refused_by_name() -> None:
    servers = Colocated(Wide(), PRESET, address="127.0.0.1", secret="s")
    state = make_trainer(preset=PRESET, recipe=Wide()).state
    state.model.weight.data = state.model.weight.data.t().contiguous().t()
    assert not servers.can_go_on(None, nodes=[0])
    with pytest.raises(UserError, match="weight is not contiguous"):
        servers.begin(state, token=1, rank=0)


def alone(*, num_servers: int) -> Trainer:
    """A trainer of one rank, with servers in this process; without any if there are to be none."""
    trainer = make_trainer(preset=PRESET, recipe=Wide())
    if num_servers:
        preset = replace(PRESET, launch=replace(PRESET.launch, servers=num_servers))
        servers = Colocated(Wide(), preset, address="127.0.0.1", secret="s")
        trainer = make_trainer(preset=PRESET, recipe=Wide(), servers=servers)
        assert not servers.can_go_on(None, nodes=[0])
        servers.begin(trainer.state, token=1, rank=0)
    return trainer


def test_all_that_is_told_of_a_step_is_the_same() -> None:
    calm, served = alone(num_servers=0), alone(num_servers=3)
    with exact_arithmetic():
        for _ in range(4):
            told = []
            for trainer in (calm, served):
                trainer.train_step()
                values = trainer.handover.journal[-1].values
                told.append({name: value for name, value in values.items() if "second" not in name})
            assert told[0] == told[1]
            assert "learning_rate" in told[0]


def test_an_error_on_a_server_ends_the_rank_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("the optimizer fails")

    trainer = alone(num_servers=2)
    monkeypatch.setattr(TensorState, "apply", fail)
    with exact_arithmetic(), pytest.raises(DeterministicError, match=r"on a server.*the optimizer fails"):
        trainer.train_step()


def test_who_gets_no_answer_does_not_wait_for_ever() -> None:
    with closing(Mesh("worker", secret="s", address="127.0.0.1", max_bytes=1)) as mesh:
        remote = Remote(mesh, token=1, primaries=["gone"], places={}, decide=len, patience_seconds=0.2)
        with pytest.raises(PrimaryLost, match="no server answered"):
            remote.pull()


@pytest.mark.parametrize(
    ("num_ranks", "num_servers"),
    [
        pytest.param(ranks, servers, marks=[] if (ranks, servers) in FEW else pytest.mark.slow)
        for ranks in (1, 2, 4)
        for servers in (1, 2, 4)
    ],
)
def test_the_bits_are_those_of_one_process(node: Node, calm: Calm, num_ranks: int, num_servers: int) -> None:
    node.train(num_ranks, servers=num_servers)
    require_same(node, calm)


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_server_that_dies_costs_the_step_that_it_was_in(node: Node, calm: Calm, victim: int) -> None:
    """Each of two ranks is the primary of a shard, and has the other's backup."""
    act = partial(kill_one_of_two, victim=victim, step=7)
    first = node.train(2, act, pauses={victim: Pause(MID_STEP, 7)}, **WITH_BACKUPS)
    second = node.train(2, **WITH_BACKUPS)
    assert [a == b for a, b in zip(first.pids(), second.pids(), strict=True)] == [victim == 1, victim == 0]
    assert node.attempts()[-1] == (2, 7, "memory")
    require_same(node, calm)


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_who_dies_when_some_shards_have_its_part_and_others_lack_it(node: Node, calm: Calm, victim: int) -> None:
    """The other one has given all of its own: the last shard holds the step's total, and the first never will."""
    act = partial(kill_one_of_two, victim=victim, step=7)
    node.train(2, act, pauses={victim: Pause(PUSHING, 7)}, **WITH_BACKUPS)
    node.train(2, **WITH_BACKUPS)
    assert node.attempts()[-1] == (2, 7, "memory")
    require_same(node, calm)


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_who_dies_when_some_parameters_have_come_and_others_have_not(node: Node, calm: Calm, victim: int) -> None:
    """The other one may have all of them, if it is not the victim that it waits for."""
    act = partial(kill_one_of_two, victim=victim, step=7)
    node.train(2, act, pauses={victim: Pause(PULLING, 7)}, **WITH_BACKUPS)
    node.train(2, **WITH_BACKUPS)
    assert node.attempts()[-1] in [(2, 7, "memory"), (2, 8, "memory")]
    require_same(node, calm)


def test_servers_outlast_a_group_that_ends_while_their_rank_computes(node: Node, calm: Calm) -> None:
    async def act(group: Group) -> None:
        await group.paused(0, 1)
        group.kill(1)
        group.go_on(0)

    first = node.train(2, act, pauses={rank: Pause(MID_STEP, 7) for rank in range(2)}, **WITH_BACKUPS)
    second = node.train(2, **WITH_BACKUPS)
    assert first.pids()[0] == second.pids()[0]
    assert node.attempts()[-1] == (2, 7, "memory")
    require_same(node, calm)


@pytest.mark.parametrize("num_replicas", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_servers_of_a_rank_that_cannot_leave_in_time_are_there_for_the_process_in_its_place(
    node: Node, calm: Calm, num_replicas: int
) -> None:
    """It computes. With one replica of each shard nobody is killed, but for all that computes."""

    async def act(group: Group) -> None:
        await group.paused(0, 1)
        if num_replicas == 2:
            group.kill(1)
        else:
            group.workers.stop()

    settings: dict[str, Any] = {"may_stay": True, "servers": 2, "server_replicas": num_replicas}
    pauses = {rank: Pause(MID_STEP, 7) for rank in range(2)}
    first = node.train(2, act, pauses=pauses, patience_seconds=0.0, **settings)
    assert first.codes()[:2] == [EXIT_STOPPED, -9 if num_replicas == 2 else EXIT_STOPPED]
    assert not set(node.train(2, **settings).pids()) & set(first.pids())
    assert node.attempts() == [(2, 0, "start"), (2, 7, "memory")]
    require_same(node, calm)


@pytest.mark.parametrize("victim", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_servers_outlast_a_second_death_while_a_group_forms(node: Node, calm: Calm, victim: int) -> None:
    """All processes of the group end then: those who gave the one that dies a state, or waited for it, are in no group
    that they could leave."""

    async def kill_again(group: Group) -> None:
        await group.paused(victim)
        group.kill(victim)

    settings: dict[str, Any] = {"may_stay": True, "servers": 3, "server_replicas": 2}
    node.pauses[victim] = [Pause(MID_STEP, 7), Pause(FORMING, 0)]
    first = node.train(3, kill_again, **settings)
    second = node.train(3, kill_again, **settings)
    survivors = [rank for rank in range(3) if rank != victim]
    assert [first.pids()[rank] == second.pids()[rank] for rank in survivors] == [True, True]
    third = node.train(3, **settings)
    assert not set(third.pids()) & set(second.pids())
    assert node.attempts() == [(3, 0, "start"), (3, 7, "memory")]
    require_same(node, calm)


@pytest.mark.parametrize(("num_before", "num_after"), [(2, 2), pytest.param(3, 2, marks=pytest.mark.slow)])
def test_a_step_that_one_shard_has_applied_is_not_applied_again(
    node: Node, calm: Calm, num_before: int, num_after: int
) -> None:
    """No rank has heard that it was done when the last of them dies."""

    async def act(group: Group) -> None:
        await group.paused(0)
        group.kill(num_before - 1)
        for rank in range(1, num_before - 1):
            await group.is_out(rank)
        group.go_on(0)

    node.train(num_before, act, pauses={0: Pause(APPLIED, 8)}, **WITH_BACKUPS)
    node.train(num_after, **WITH_BACKUPS)
    assert node.attempts()[-1] == (num_after, 7, "memory")
    require_same(node, calm)


def test_servers_regroup_with_more_and_with_fewer_ranks(node: Node, calm: Calm) -> None:
    settings: dict[str, Any] = {"may_stay": True, "servers": 3, "server_replicas": 2}
    node.train(2, partial(regroup, rank=1), pauses={1: Pause(MID_STEP, 4)}, **settings)
    node.train(4, partial(regroup, rank=3), pauses={3: Pause(MID_STEP, 8)}, **settings)
    node.hands.pop(3).end()
    node.train(3, **settings)
    assert node.attempts()[-1][2] == "memory"
    require_same(node, calm)


def test_without_a_backup_the_steps_since_the_checkpoint_are_done_again(node: Node, calm: Calm) -> None:
    async def act(group: Group) -> None:
        await has_checkpoint(node, groups.EVERY)
        await kill_one_of_two(group, 1, step=7)

    settings: dict[str, Any] = {"may_stay": True, "servers": 2, "server_replicas": 1}
    node.train(2, act, pauses={1: Pause(MID_STEP, 7)}, **settings)
    node.train(2, **settings)
    assert node.attempts()[-1] == (2, groups.EVERY, "checkpoint")
    require_same(node, calm)


def test_a_checkpoint_of_servers_goes_on_without_and_the_other_way_round(node: Node, calm: Calm) -> None:
    train_in_both_modes(node)
    require_same(node, calm)
