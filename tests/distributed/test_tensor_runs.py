"""Whole runs with matrices in parts, on real ranks: the same bits, whoever dies, and with however many replicas and
stages it goes on; and one process's but for rounding."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest

from tests.conftest import Stack
from tests.distributed import groups
from tests.distributed.groups import EVERY, STEPS, Calm, Node, Pause, make_node, regroup, require_same
from tests.distributed.in_tensors import POISON, InTensors
from tests.distributed.pausing import MID_STEP, UPDATING, VALIDATING
from tests.distributed.spread import departure_of, in_mode, kill
from tests.distributed.tensoring import disturb
from tests.unit.tiny import CPU, exact_arithmetic, make_trainer
from training.checkpoints.checkpoint import load_checkpoint
from training.checkpoints.state import TrainState
from training.cluster.zygote import Zygote
from training.config import ParallelConfig
from training.control import EXIT_STOPPED
from training.memory.slots import create_slots
from training.s3.objectstore import Store

PRESET = replace(
    groups.PRESET,
    recipe="tests.distributed.in_tensors:InTensors",
    train=replace(groups.PRESET.train, batch_size=24, virtual_workers=6),
    launch=replace(groups.PRESET.launch, processes_per_node=4, grace_seconds=100.0),
    parallel=ParallelConfig(tensor=2),
)
ALONE = replace(PRESET, parallel=ParallelConfig())
PARTS = PRESET.parallel
STAGES = replace(PARTS, pipeline=2)
INTERLEAVED = replace(STAGES, schedule="interleaved")
NUM_DISTURBED = 3
zygote, node, _ = groups.fixtures(PRESET, InTensors())


@pytest.fixture(scope="module")
def calm(stack: Stack, zygote: Zygote) -> Iterator[Calm]:
    """A run on two ranks that nothing happens to."""
    store = Store(replace(stack.location, prefix="tests/calm-tensor-run/"))
    with closing(make_node(store, zygote, PRESET, InTensors())) as node:
        assert node.train(2).codes() == [0, 0]
        result = node.run.read().result
        assert result is not None
        yield result.state_sha256, node.told()


def disturbed_losses(seed: int) -> list[float]:
    """Of one process, in which each sum that ranks may take otherwise is disturbed."""
    trainer = make_trainer(preset=ALONE, recipe=InTensors())
    disturb(trainer, seed)
    with exact_arithmetic():
        return [trainer.train_step().loss for _ in range(STEPS)]


def test_it_is_one_process_s_but_for_rounding(calm: Calm) -> None:
    """Its ledger is the same. How far losses may be off is found as in test_tensor.py."""
    state, told = groups.calm(preset=ALONE, recipe=InTensors())
    assert calm[0] != state
    assert [samples for _, _, samples, _ in calm[1]] == [samples for _, _, samples, _ in told]
    others = [disturbed_losses(seed) for seed in range(NUM_DISTURBED)]
    for (_, loss, _, scores), (_, due, _, due_scores), *found in zip(
        calm[1], told, *(accumulate(_off(other, told), max) for other in others), strict=True
    ):
        assert 0 < max(found) < 1e-3
        assert abs(loss - due) <= max(found)
        assert scores == pytest.approx(due_scores, abs=1e-3)


def _off(losses: list[float], told: list[groups.Told]) -> list[float]:
    return [abs(loss - due) for loss, (_, due, _, _) in zip(losses, told, strict=True)]


def test_replicas_change_no_bit_and_the_state_is_one_process_s_file(node: Node, calm: Calm) -> None:
    assert node.train(4).codes() == [0] * 4
    require_same(node, calm)
    record = node.run.read()
    assert record.result is not None
    whole = TrainState(InTensors(), seed=PRESET.seed, device=CPU)
    whole.load(load_checkpoint(node.run.store, node.run.prefix(record), record.result.checkpoint), step=STEPS)
    assert whole.state_sha256() == calm[0]


def test_whoever_dies_it_goes_on_in_as_many_parts(node: Node, calm: Calm) -> None:
    """Of two replicas one is left after a death, then both are there again, and told to end; the last one goes on."""
    first = node.train(4, kill(node, victim=1, checkpoint=EVERY), pauses={1: Pause(MID_STEP, 6)})
    assert first.codes()[1] == -signal.SIGKILL
    departure = first.ended.result().maybe_departure
    assert departure is not None
    assert departure.class_name in ("Killed", "PeerLost"), departure.cause
    second = node.train(4, regroup, pauses={1: Pause(MID_STEP, 6)})
    assert second.codes() == [EXIT_STOPPED] * 4
    node.train(2)
    assert node.attempts() == [(4, 0, "start"), (4, EVERY, "checkpoint"), (2, 7, "checkpoint")]
    require_same(node, calm)


@pytest.mark.parametrize(
    "parallel",
    [
        INTERLEAVED,
        pytest.param(STAGES, marks=pytest.mark.slow),
        pytest.param(replace(STAGES, schedule="gpipe"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_stages_change_no_bit(node: Node, calm: Calm, parallel: ParallelConfig) -> None:
    in_mode(node, parallel)
    assert node.train(4).codes() == [0] * 4
    assert node.attempts() == [(4, 0, "start")]
    require_same(node, calm)


def test_of_stages_with_parts_fewer_go_on_in_as_many_parts(node: Node, calm: Calm) -> None:
    """A rank of the second stage dies in the midst of a step; two that are left have all layers each, and one of them
    dies; then all are there again."""
    in_mode(node, STAGES)
    first = node.train(4, kill(node, victim=3, checkpoint=EVERY), pauses={3: Pause(MID_STEP, 6)})
    departure = first.ended.result().maybe_departure
    assert departure is not None
    assert departure.class_name in ("Killed", "PeerLost"), departure.cause
    second = node.train(2, kill(node, victim=0, checkpoint=2 * EVERY), pauses={0: Pause(MID_STEP, 11)}, nodes=2)
    assert second.codes()[0] == -signal.SIGKILL
    assert node.train(4).codes() == [0] * 4
    assert node.attempts() == [(4, 0, "start"), (2, EVERY, "checkpoint"), (4, 2 * EVERY, "checkpoint")]
    require_same(node, calm)


@pytest.mark.slow
def test_of_two_replicas_of_stages_three_without_are_left(store: Store, zygote: Zygote, calm: Calm) -> None:
    """Of eight ranks six, which make three replicas, each with all layers in two parts."""
    preset = replace(PRESET, parallel=STAGES, launch=replace(PRESET.launch, processes_per_node=8))
    with closing(make_node(store, zygote, preset, InTensors())) as node:
        node.slots += [create_slots() for _ in range(4)]
        first = node.train(8, kill(node, victim=6, checkpoint=EVERY), pauses={6: Pause(UPDATING, 6)})
        assert first.codes()[6] == -signal.SIGKILL
        assert node.train(6, nodes=2).codes() == [0] * 6
        assert node.attempts() == [(8, 0, "start"), (6, EVERY, "checkpoint")]
        require_same(node, calm)


@pytest.mark.parametrize(
    ("place", "parallel"),
    [
        (UPDATING, PARTS),
        pytest.param(VALIDATING, PARTS, marks=pytest.mark.slow),
        pytest.param(VALIDATING, STAGES, marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_dies_outside_of_its_virtual_workers_is_a_lost_peer(
    node: Node, calm: Calm, place: str, parallel: ParallelConfig
) -> None:
    in_mode(node, parallel)
    num_ranks = parallel.pipeline * parallel.tensor
    first = node.train(num_ranks, kill(node, victim=1, checkpoint=EVERY), pauses={1: Pause(place, 6)})
    departure = first.ended.result().maybe_departure
    assert departure is not None
    assert departure.class_name in ("Killed", "PeerLost"), departure.cause
    node.train(4)
    assert node.attempts() == [(num_ranks, 0, "start"), (4, EVERY, "checkpoint")]
    require_same(node, calm)


@pytest.mark.parametrize(
    ("fails", "parallel", "message"),
    [
        ("loss", PARTS, "the loss is nan"),
        ("forward", PARTS, "what is this?"),
        ("one forward", PARTS, "what is this?"),
        ("one backward", PARTS, "whither?"),
        ("one backward at 0", PARTS, "whither?"),
        pytest.param("backward", PARTS, "whither?", marks=pytest.mark.slow),
        ("one forward at 0", STAGES, "chunk 0 of the pipeline: the recipe failed: ValueError: what is this?"),
        ("one backward", STAGES, "chunk 1 of the pipeline: the recipe failed: ValueError: whither?"),
        ("all backward at 0", STAGES, "chunk 0 of the pipeline: the recipe failed: ValueError: whither?"),
        pytest.param("loss", STAGES, "the loss is nan", marks=pytest.mark.slow),
        pytest.param("one forward", STAGES, "what is this?", marks=pytest.mark.slow),
        pytest.param("one backward at 0", STAGES, "whither?", marks=pytest.mark.slow),
        pytest.param("all forward at 0", replace(STAGES, schedule="gpipe"), "what is this?", marks=pytest.mark.slow),
        pytest.param("one forward at 1", INTERLEAVED, "chunk 1 of the pipeline", marks=pytest.mark.slow),
        pytest.param("one backward at 2", INTERLEAVED, "chunk 2 of the pipeline", marks=pytest.mark.slow),
    ],
)
def test_a_record_that_makes_a_step_fail_is_found(
    store: Store, zygote: Zygote, fails: str, parallel: ParallelConfig, message: str
) -> None:
    """Also if one rank alone sees it, for which others wait in the midst of the same virtual worker, or in another
    stage. Without stages, in two replicas."""
    departure = departure_of(store, zygote, replace(PRESET, parallel=parallel), InTensors, fails, num_ranks=4)
    assert (departure.class_name, departure.records) == ("DeterministicError", (f"memory:{POISON}",)), departure
    assert f"step {departure.step + 1}, virtual worker " in departure.cause
    assert message in departure.cause


def test_a_rank_that_dies_while_the_model_is_tried_is_a_lost_peer(
    store: Store, zygote: Zygote, calm: Calm, tmp_path: Path
) -> None:
    died = tmp_path / "died"
    preset = replace(PRESET, hyperparameters={"dies_at": str(died)})
    with closing(make_node(store, zygote, preset, InTensors(dies_at=str(died)))) as node:
        departure = node.train(2).ended.result().maybe_departure
        assert departure is not None
        assert died.exists()
        assert departure.class_name in ("Killed", "PeerLost"), departure.cause
        assert node.train(2).codes() == [0, 0]
        require_same(node, calm)


@pytest.mark.parametrize("parallel", [PARTS, pytest.param(STAGES, marks=pytest.mark.slow)], ids=str)
def test_what_fails_by_chance_is_worth_another_attempt(store: Store, zygote: Zygote, parallel: ParallelConfig) -> None:
    num_ranks = parallel.pipeline * parallel.tensor
    preset = replace(PRESET, parallel=parallel)
    departure = departure_of(store, zygote, preset, InTensors, "one once", num_ranks=num_ranks)
    assert (departure.class_name, departure.records) == ("Exception", ())
    assert "by chance" in departure.cause


def test_ranks_that_make_no_whole_replicas_are_told_so(node: Node) -> None:
    """Agents do not begin such a group; another launcher might."""
    node.job = replace(node.job, preset=replace(PRESET, launch=replace(PRESET.launch, processes_per_node=4)))
    departure = node.train(3, nodes=2).ended.result().maybe_departure
    assert departure is not None
    assert departure.class_name == "UserError"
    assert "3 are no multiple of 2: change launch.nodes" in departure.cause
