"""Whole runs in pipelines, on real ranks: the bits of one process, whoever dies, and however many go on."""

from __future__ import annotations

import signal
from dataclasses import replace

import pytest

from tests.distributed import groups
from tests.distributed.groups import EVERY, Calm, Node, Pause, regroup, require_same
from tests.distributed.in_parts import POISON, InParts
from tests.distributed.pausing import MID_STEP, UPDATING, VALIDATING
from tests.distributed.spread import departure_of, in_mode, kill
from training.cluster.zygote import Zygote
from training.config import ParallelConfig
from training.control import EXIT_STOPPED
from training.s3.objectstore import Store

PRESET = replace(
    groups.PRESET,
    recipe="tests.distributed.in_parts:InParts",
    train=replace(groups.PRESET.train, batch_size=24, virtual_workers=6),
    launch=replace(groups.PRESET.launch, processes_per_node=4, grace_seconds=100.0),
    parallel=ParallelConfig(pipeline=2),
)
FOUR_STAGES = ParallelConfig(pipeline=4)
INTERLEAVED = ParallelConfig(pipeline=2, schedule="interleaved")
zygote, node, calm = groups.fixtures(PRESET, InParts())


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(pipeline=2, schedule="gpipe"),
        FOUR_STAGES,
        INTERLEAVED,
    ],
    ids=str,
)
def test_a_run_in_a_pipeline_has_the_bits_of_one_process(node: Node, calm: Calm, parallel: ParallelConfig) -> None:
    """Its losses, its ledger and its scores on the way, too. On four ranks: as two replicas, or as one."""
    in_mode(node, parallel)
    assert node.train(4).codes() == [0] * 4
    assert node.attempts() == [(4, 0, "start")]
    require_same(node, calm)


def test_whoever_dies_and_in_whatever_mode_it_goes_on_the_bits_are_the_same(node: Node, calm: Calm) -> None:
    """In two stages, whole on one rank, as two replicas, which are told to end, and on one again."""
    first = node.train(2, kill(node, victim=1, checkpoint=EVERY), pauses={1: Pause(MID_STEP, 6)})
    assert first.codes()[1] == -signal.SIGKILL
    in_mode(node, ParallelConfig())
    second = node.train(1, kill(node, victim=0, checkpoint=2 * EVERY), pauses={0: Pause(MID_STEP, 11)})
    assert second.codes() == [-signal.SIGKILL]
    in_mode(node, PRESET.parallel)
    third = node.train(4, regroup, pauses={1: Pause(MID_STEP, 10)})
    assert third.codes() == [EXIT_STOPPED] * 4
    node.train(2)
    later = [(1, EVERY, "checkpoint"), (4, 2 * EVERY, "checkpoint"), (2, 11, "checkpoint")]
    assert node.attempts() == [(2, 0, "start"), *later]
    require_same(node, calm)


@pytest.mark.parametrize(
    ("place", "num_stages", "num_left"), [(UPDATING, 4, 2), (VALIDATING, 2, 3)], ids=["updating", "validating"]
)
def test_what_is_left_goes_on_in_fewer_stages(
    node: Node, calm: Calm, place: str, num_stages: int, num_left: int
) -> None:
    """A rank dies outside of its virtual workers, where the others wait for it in a collective: it is a lost peer.
    Of four stages two are left; of two replicas of two stages three replicas, each with all of the model."""
    in_mode(node, ParallelConfig(pipeline=num_stages))
    first = node.train(4, kill(node, victim=2, checkpoint=EVERY), pauses={2: Pause(place, 6)})
    departure = first.ended.result().maybe_departure
    assert first.codes()[2] == -signal.SIGKILL
    assert departure is not None
    assert departure.class_name in ("Killed", "PeerLost"), departure.cause
    node.train(num_left, nodes=2)
    assert node.attempts() == [(4, 0, "start"), (num_left, EVERY, "checkpoint")]
    require_same(node, calm)


@pytest.mark.parametrize(
    ("fails", "parallel", "message"),
    [
        ("loss", PRESET.parallel, "the loss is nan"),
        ("0 forward", PRESET.parallel, "chunk 0 of the pipeline: the recipe failed: ValueError: what is this?"),
        ("3 forward", PRESET.parallel, "chunk 1 of the pipeline: the recipe failed: ValueError: what is this?"),
        ("0 backward", PRESET.parallel, "chunk 0 of the pipeline: the recipe failed: ValueError: whither?"),
        ("1 forward", FOUR_STAGES, "chunk 1 of the pipeline: the recipe failed: ValueError: what is this?"),
        ("2 backward", INTERLEAVED, "chunk 2 of the pipeline: the recipe failed: ValueError: whither?"),
    ],
)
def test_a_record_that_makes_a_step_fail_is_found(
    store: Store, zygote: Zygote, fails: str, parallel: ParallelConfig, message: str
) -> None:
    """Whichever stage it fails on, and although no rank could compute the model by itself just then."""
    departure = departure_of(
        store, zygote, replace(PRESET, parallel=parallel), InParts, fails, num_ranks=parallel.pipeline
    )
    assert (departure.class_name, departure.records) == ("DeterministicError", (f"memory:{POISON}",))
    assert f"step {departure.step + 1}, virtual worker " in departure.cause
    assert message in departure.cause


def test_what_fails_by_chance_is_worth_another_attempt(store: Store, zygote: Zygote) -> None:
    departure = departure_of(store, zygote, PRESET, InParts, "3 once", num_ranks=2)
    assert (departure.class_name, departure.records) == ("Exception", ())
    assert "by chance" in departure.cause
