"""Whole runs with sharded state, on real ranks: the bits of one process, whoever dies, and however many go on."""

from __future__ import annotations

import signal
from dataclasses import replace

import pytest

from tests.distributed import groups
from tests.distributed.groups import EVERY, Calm, Node, Pause, regroup, require_same
from tests.distributed.in_blocks import POISON, InBlocks
from tests.distributed.pausing import MID_STEP, UPDATING, VALIDATING
from tests.distributed.spread import departure_of, in_mode, kill
from training.cluster.zygote import Zygote
from training.config import ParallelConfig
from training.control import EXIT_STOPPED
from training.s3.objectstore import Store

PRESET = replace(
    groups.PRESET,
    recipe="tests.distributed.in_blocks:InBlocks",
    launch=replace(groups.PRESET.launch, processes_per_node=2, grace_seconds=100.0),
    parallel=ParallelConfig(shard=2),
)
zygote, node, calm = groups.fixtures(PRESET, InBlocks())


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_run_in_shards_has_the_bits_of_one_process(node: Node, calm: Calm, num_ranks: int) -> None:
    """Its losses, its ledger and its scores on the way, too."""
    group = node.train(num_ranks)
    assert group.codes() == [0] * num_ranks
    assert node.attempts() == [(num_ranks, 0, "start")]
    require_same(node, calm)


def test_whoever_dies_and_in_whatever_mode_it_goes_on_the_bits_are_the_same(node: Node, calm: Calm) -> None:
    """In shards on two ranks, whole on one, in shards on four: of each group only a checkpoint is left."""
    first = node.train(2, kill(node, victim=1, checkpoint=EVERY), pauses={1: Pause(MID_STEP, 7)})
    assert first.codes()[1] == -signal.SIGKILL
    in_mode(node, ParallelConfig())
    second = node.train(1, kill(node, victim=0, checkpoint=2 * EVERY), pauses={0: Pause(MID_STEP, 11)})
    assert second.codes() == [-signal.SIGKILL]
    in_mode(node, PRESET.parallel)
    node.train(4)
    assert node.attempts() == [(2, 0, "start"), (1, EVERY, "checkpoint"), (4, 2 * EVERY, "checkpoint")]
    require_same(node, calm)


@pytest.mark.parametrize("place", [UPDATING, VALIDATING])
def test_a_rank_that_dies_outside_of_its_virtual_workers_is_a_lost_peer(node: Node, calm: Calm, place: str) -> None:
    """Others wait for it in a collective there. One rank of two goes on alone, with all of the state."""
    first = node.train(4, kill(node, victim=2, checkpoint=EVERY), pauses={2: Pause(place, 6)})
    departure = first.ended.result().maybe_departure
    assert first.codes()[2] == -signal.SIGKILL
    assert departure is not None
    assert departure.class_name != "DeterministicError", departure.cause
    node.train(1, nodes=2)
    assert node.attempts() == [(4, 0, "start"), (1, EVERY, "checkpoint")]
    require_same(node, calm)


def test_a_group_that_is_to_end_makes_a_checkpoint_first(node: Node, calm: Calm) -> None:
    first = node.train(2, regroup, pauses={1: Pause(MID_STEP, 7)})
    assert first.codes() == [EXIT_STOPPED] * 2
    node.train(2)
    assert node.attempts()[-1] == (2, 8, "checkpoint")
    require_same(node, calm)


@pytest.mark.parametrize(
    ("fails", "message"), [("loss", "the loss is nan"), ("forward", "what is this?"), ("backward", "whither?")]
)
def test_a_record_that_makes_a_step_fail_is_found(store: Store, zygote: Zygote, fails: str, message: str) -> None:
    """Although no rank could compute the model by itself just then."""
    departure = departure_of(store, zygote, PRESET, InBlocks, fails, num_ranks=2)
    assert (departure.class_name, departure.records) == ("DeterministicError", (f"memory:{POISON}",))
    assert f"step {departure.step + 1}, virtual worker " in departure.cause
    assert message in departure.cause


def test_what_fails_by_chance_is_worth_another_attempt(store: Store, zygote: Zygote) -> None:
    """On all ranks: none says that it would fail again."""
    departure = departure_of(store, zygote, PRESET, InBlocks, "once", num_ranks=2)
    assert (departure.class_name, departure.records) == ("Exception", ())
    assert "by chance" in departure.cause
