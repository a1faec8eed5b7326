"""Real ranks that die, hang, are told to stop, to regroup or to go: the next group goes on at the same step, whatever
its size, and ends in the bits and the history of a run that nothing happened to."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial

import pytest

from tests.distributed import groups
from tests.distributed.groups import Calm, Group, Node, Pause, kill_one_of_two, regroup, require_same
from tests.distributed.pausing import MID_STEP, UPDATING, VALIDATED, VALIDATING
from tests.faults.proxy import LosingProxy
from training import tensorfile
from training.control import EXIT_STOPPED, Order
from training.memory.slots import Slots

zygote, node, calm = groups.fixtures()


@pytest.mark.parametrize("num_ranks_after", [1, 2, 3])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_in_the_midst_of_a_step_costs_that_step_only(
    node: Node, calm: Calm, victim: int, num_ranks_after: int
) -> None:
    first = node.train(2, partial(kill_one_of_two, victim=victim, step=7), pauses={victim: Pause(MID_STEP, 7)})
    assert first.codes()[victim] == -9
    if num_ranks_after == 1:
        node.slots = [node.slots[1 - victim]]
    assert sorted(step or 0 for step in node.steps_in_memory())[-2:] in ([0, 7], [7])
    node.train(num_ranks_after)
    assert node.attempts()[-1] == (num_ranks_after, 7, "memory")
    require_same(node, calm)


async def freeze_and_stop(group: Group) -> None:
    """One is frozen, the other waits for it, and both are told to stop; who has not once the other has is killed."""
    await group.paused(1)
    group.freeze(1)
    await group.waits(0, step=7)
    group.workers.stop()
    await group.is_out(0)
    group.workers.kill()


def test_a_rank_that_waits_for_a_frozen_one_stops_when_it_is_told(node: Node, calm: Calm) -> None:
    """Its main thread is inside a collective, and stays there."""
    first = node.train(2, freeze_and_stop, pauses={1: Pause(MID_STEP, 7)})
    assert first.codes() == [EXIT_STOPPED, -9]
    assert node.steps_in_memory() == [7, None, None, None]
    node.train(2)
    assert node.attempts()[-1] == (2, 7, "memory")
    require_same(node, calm)


def test_ranks_that_stop_at_different_steps_go_on_at_the_higher_one(node: Node, calm: Calm) -> None:
    """One is stuck in the midst of an update and leaves nothing; the other has finished that step."""

    async def stop(group: Group) -> None:
        await group.paused(1)
        await group.waits(0, step=8)
        group.workers.stop()

    first = node.train(2, stop, pauses={1: Pause(UPDATING, 7)})
    assert first.codes() == [EXIT_STOPPED, EXIT_STOPPED]
    assert node.steps_in_memory() == [8, None, None, None]
    node.train(3)
    assert node.attempts()[-1] == (3, 8, "memory")
    require_same(node, calm)


@pytest.mark.parametrize("behind", [0, 1])
def test_ranks_of_which_one_has_noted_the_validation_go_on_alike(node: Node, calm: Calm, behind: int) -> None:
    async def stop(group: Group) -> None:
        await group.paused(behind)
        await group.waits(1 - behind, step=6)
        group.workers.stop()

    first = node.train(2, stop, pauses={behind: Pause(VALIDATED, 6)})
    assert first.codes() == [EXIT_STOPPED, EXIT_STOPPED]
    assert node.steps_in_memory() == [6, 6, None, None]
    node.train(2)
    assert node.attempts()[-1] == (2, 6, "memory")
    require_same(node, calm)


def test_all_ranks_regroup_after_the_same_step_although_one_is_told(node: Node, calm: Calm) -> None:
    first = node.train(2, regroup, pauses={1: Pause(MID_STEP, 7)})
    assert first.codes() == [EXIT_STOPPED, EXIT_STOPPED]
    assert node.steps_in_memory() == [8, 8, None, None], "after the step in which it was told"
    node.train(3)
    assert node.attempts()[-1] == (3, 8, "memory")
    require_same(node, calm)


@pytest.mark.parametrize("odd_one", [0, 1])
def test_ranks_with_different_bytes_of_one_step_take_the_same(node: Node, calm: Calm, odd_one: int) -> None:
    """As fast mode may have left them, in groups that knew nothing of one another: else replicas part for good."""
    node.train(2, regroup, pauses={1: Pause(MID_STEP, 7)})
    change_a_weight(Slots(node.slots[odd_one]), node.job.key)
    node.train(2)
    assert node.attempts()[-1] == (2, 8, "memory")
    result = node.run.read().result
    assert result is not None
    assert (result.state_sha256 == calm[0]) == (odd_one == 1), "the lowest rank's are taken"


def change_a_weight(slots: Slots, key: str) -> None:
    """In the newest state."""
    memory = slots.newest(key, 0)
    assert memory is not None
    body = bytearray(memory.body)
    tensorfile.tensors(memoryview(body)[: memory.header.num_file_bytes])["model.weight"][0, 0] += 1

    def fill(place: memoryview) -> None:
        place[:] = body

    for _ in range(2):
        assert slots.write(replace(memory.header, file_digest="", journal_digest=""), fill)


async def tell_to_go(group: Group, *, rank: int, seconds: float) -> None:
    await group.order(rank, Order(do="preempt", seconds=seconds))
    group.go_on(rank)


def test_preempted_ranks_leave_together_after_a_checkpoint(node: Node, calm: Calm) -> None:
    async def preempt(group: Group) -> None:
        await group.paused(1)
        await tell_to_go(group, rank=1, seconds=60.0)

    first = node.train(2, preempt, pauses={1: Pause(MID_STEP, 7)}, grace_seconds=60.0)
    assert first.codes() == [EXIT_STOPPED, EXIT_STOPPED]
    step, same, *_ = node.steps_in_memory()
    assert step == same == node.run.read().checkpoints[-1].step
    node.train(1)
    assert node.attempts()[-1] == (1, step, "memory")
    require_same(node, calm)


def test_preempted_ranks_wait_no_longer_than_they_may_for_a_store_that_is_away(
    node: Node, proxy: LosingProxy, calm: Calm
) -> None:
    node.reach_store_at(proxy.endpoint)

    async def preempt_without_store(group: Group) -> None:
        await group.paused(1)
        proxy.is_away = True  # until they are gone
        await tell_to_go(group, rank=1, seconds=2.0)

    first = node.train(2, preempt_without_store, pauses={1: Pause(MID_STEP, 7)}, grace_seconds=2.0)
    assert proxy.num_refused > 0
    assert first.codes() == [EXIT_STOPPED, EXIT_STOPPED]
    proxy.is_away = False
    step, same, *_ = node.steps_in_memory()
    assert step == same
    assert step not in [checkpoint.step for checkpoint in node.run.read().checkpoints]
    node.train(2)
    assert node.attempts()[-1] == (2, step, "memory")
    require_same(node, calm)


def test_no_checkpoint_is_needed_to_go_on(node: Node, proxy: LosingProxy, calm: Calm) -> None:
    """The store takes none; so all steps are told again from memory, by whoever is rank 0 then."""
    node.reach_store_at(proxy.endpoint)
    proxy.maybe_refused = "/checkpoints/"

    async def kill(group: Group) -> None:
        await group.paused(0)
        while not proxy.num_refused:  # what it began to save after step 5
            await asyncio.sleep(0.02)
        group.kill(0)

    node.train(2, kill, pauses={0: Pause(MID_STEP, 7)})
    assert node.run.read().checkpoints == ()
    proxy.maybe_refused = None
    node.train(2)
    assert node.attempts()[-1] == (2, 7, "memory")
    assert node.run.read().resume_steps == (0, 0)
    require_same(node, calm)


# ---- processes that stay ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("victims", [(0, 0), (1, 1), (0, 1), (1, 0)])
def test_survivors_keep_their_process_and_go_on_with_the_state_that_they_have(
    node: Node, calm: Calm, victims: tuple[int, int]
) -> None:
    """Two groups of three end by a kill, and the third finishes."""
    for victim, step in zip(victims, (4, 7), strict=True):
        node.pauses.setdefault(victim, []).append(Pause(MID_STEP, step))
    pids = []
    for victim in victims:

        async def kill(group: Group, victim: int = victim) -> None:
            await group.paused(victim)
            group.kill(victim)

        pids.append(node.train(3, kill, may_stay=True).pids())
    pids.append(node.train(3, may_stay=True).pids())
    for before, after, victim in zip(pids, pids[1:], victims, strict=False):
        assert [rank for rank in range(3) if before[rank] != after[rank]] == [victim]
    assert node.attempts()[-1] == (3, 7, "memory")
    require_same(node, calm)


def test_who_waits_in_validation_for_one_that_dies_stays(node: Node, calm: Calm) -> None:
    act = partial(kill_one_of_two, victim=1, step=5)
    first = node.train(2, act, pauses={1: Pause(VALIDATING, 6)}, may_stay=True)
    second = node.train(2, may_stay=True)
    assert [before == after for before, after in zip(first.pids(), second.pids(), strict=True)] == [True, False]
    assert node.attempts()[-1] == (2, 6, "memory")
    require_same(node, calm)


def test_ranks_that_regroup_keep_their_processes(node: Node, calm: Calm) -> None:
    first = node.train(2, regroup, pauses={1: Pause(MID_STEP, 7)}, may_stay=True)
    second = node.train(3, may_stay=True)
    assert second.pids()[:2] == first.pids()
    assert node.attempts()[-1] == (3, 8, "memory")
    require_same(node, calm)


def test_a_process_whose_state_is_behind_takes_that_of_the_others(node: Node, calm: Calm) -> None:
    """One sat out a group, in which the other came further."""
    first = node.train(2, regroup, pauses={1: Pause(MID_STEP, 4)}, may_stay=True)
    node.hands.pop(0).end()
    node.train(1, partial(regroup, rank=0), pauses={0: Pause(MID_STEP, 9)})
    last = node.train(2, may_stay=True)
    assert last.pids()[1] == first.pids()[1]
    assert node.attempts()[-1] == (2, 10, "memory")
    require_same(node, calm)


def test_a_rank_that_waits_for_a_frozen_one_stays_when_it_is_told_to_stop(node: Node, calm: Calm) -> None:
    """Nothing comes by the connection between the two, which is open."""
    first = node.train(2, freeze_and_stop, pauses={1: Pause(MID_STEP, 7)}, may_stay=True)
    second = node.train(2, may_stay=True)
    assert [before == after for before, after in zip(first.pids(), second.pids(), strict=True)] == [True, False]
    assert node.attempts()[-1] == (2, 7, "memory")
    require_same(node, calm)


def test_ranks_that_cannot_leave_in_time_end_instead(node: Node, calm: Calm) -> None:
    """They compute."""

    async def stop(group: Group) -> None:
        await group.paused(0, 1)
        group.workers.stop()

    pauses = {rank: Pause(MID_STEP, 7) for rank in range(2)}
    first = node.train(2, stop, pauses=pauses, may_stay=True, patience_seconds=0.0)
    assert first.codes()[:2] == [EXIT_STOPPED, EXIT_STOPPED]
    assert not set(node.train(2, may_stay=True).pids()) & set(first.pids())
    assert node.attempts()[-1] == (2, 7, "memory")
    require_same(node, calm)


def test_a_spare_takes_the_place_of_a_rank_that_dies(node: Node, calm: Calm) -> None:
    async def kill(group: Group) -> None:
        await group.paused(1)
        await group.has_spares(2)
        group.kill(1)

    first = node.train(2, kill, pauses={1: Pause(MID_STEP, 7)}, may_stay=True, keep_spares=True)
    spares = {process.pid for process in first.processes} - set(first.pids())
    second = node.train(2, may_stay=True)
    assert len(spares) == 2
    assert second.pids()[0] == first.pids()[0]
    assert second.pids()[1] in spares
    assert node.attempts()[-1] == (2, 7, "memory")
    require_same(node, calm)
