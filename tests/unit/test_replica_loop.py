"""What a rank of a replica of several reckons by itself: its replica's virtual workers, its part of them, and who is
slow; and what one rank cannot do again."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.unit.tiny import CPU, Tiny, make_trainer, tiny_preset
from training.checkpoints.state import TrainState
from training.config import LaunchConfig, ParallelConfig
from training.errors import UserError
from training.layout import Layout
from training.parallel.tensor import require_cuttable
from training.recipes.stdlib import ByteTransformer
from training.replay import begin_replay
from training.replica_loop import ReplicaTrainer
from training.runs.job import Job
from training.runs.pace import Straggler
from training.runs.record import Record
from training.s3.objectstore import StoreLocation

STAGES, PARTS, BOTH = ParallelConfig(pipeline=2), ParallelConfig(tensor=2), ParallelConfig(pipeline=2, tensor=2)


def trainer(rank: int, world_size: int, parallel: ParallelConfig) -> ReplicaTrainer:
    preset = tiny_preset(virtual_workers=6, batch_size=12)
    made = make_trainer(
        preset=replace(preset, launch=LaunchConfig(nodes=4), parallel=parallel),
        rank=rank,
        world_size=world_size,
        kind=ReplicaTrainer,
    )
    assert isinstance(made, ReplicaTrainer)
    return made


def test_replicas_share_the_virtual_workers_and_their_stages_have_the_same() -> None:
    assert [trainer(rank, 4, STAGES).layout for rank in range(4)] == [Layout(data=2, pipeline=2)] * 4
    assert trainer(3, 4, STAGES).balance.shares == (3, 3)
    assert trainer(3, 4, replace(STAGES, schedule="interleaved")).balance.shares == (2, 4)
    assert trainer(0, 3, STAGES).balance.shares == (2, 2, 2)
    assert trainer(0, 3, STAGES).extras.num_elements == trainer(0, 2, STAGES).extras.num_elements


def test_so_do_ranks_with_parts() -> None:
    assert [trainer(rank, 4, PARTS).layout for rank in range(4)] == [Layout(data=2, tensor=2)] * 4
    assert [trainer(rank, 4, PARTS).balance.shares for rank in range(4)] == [(3, 3)] * 4
    assert trainer(1, 2, PARTS).balance.shares == (6,)
    with pytest.raises(UserError, match="3 are no multiple of 2"):
        trainer(0, 3, PARTS)


def test_stages_with_parts_become_fewer_and_their_parts_do_not() -> None:
    assert trainer(7, 8, BOTH).layout == Layout(data=2, pipeline=2, tensor=2)
    assert trainer(7, 8, BOTH).balance.shares == (3, 3)
    assert trainer(3, 4, BOTH).layout == Layout(pipeline=2, tensor=2)
    assert trainer(0, 6, replace(BOTH, schedule="interleaved")).layout == Layout(data=3, tensor=2)
    assert trainer(0, 2, BOTH).layout == Layout(tensor=2)
    with pytest.raises(UserError, match="5 are no multiple of 2"):
        trainer(0, 5, BOTH)


def test_stages_are_compared_with_their_like() -> None:
    pair = trainer(0, 4, STAGES)
    assert pair.straggler([1.0, 9.0, 1.0, 9.0]) is None
    assert pair.straggler([1.0, 9.0, 1.0, 18.0]) == Straggler(rank=3, factor=2.0)
    assert pair.straggler([3.0, 9.0, 1.0, 9.0]) == Straggler(rank=0, factor=3.0)


def test_of_parts_all_ranks_of_a_stage_are_compared() -> None:
    four = trainer(0, 4, PARTS)
    assert four.straggler([1.0, 1.0, 1.0, 1.0]) is None
    assert four.straggler([1.0, 1.0, 1.0, 2.0]) == Straggler(rank=3, factor=2.0)
    both = trainer(0, 4, BOTH)
    assert both.straggler([1.0, 1.0, 9.0, 9.0]) is None
    assert both.straggler([1.0, 1.0, 9.0, 18.0]) == Straggler(rank=3, factor=2.0)


def test_one_rank_does_no_steps_again_that_others_did_together() -> None:
    preset = replace(tiny_preset(), launch=LaunchConfig(nodes=4), parallel=PARTS)
    job = Job(
        key="k", generation=0, preset=preset, dataset_digest="d", location=StoreLocation(endpoint=None, bucket="b")
    )
    with pytest.raises(UserError, match=r"parallel\.tensor = 2: its bits are those of 2 ranks .* --fresh"):
        begin_replay(job, Record(key="k"), first=1)


def test_a_process_refuses_what_cannot_be_cut_before_anybody_waits_for_it() -> None:
    recipe = ByteTransformer(sequence_bytes=8, width=16, num_layers=1, num_heads=2)
    require_cuttable(recipe, TrainState(recipe, seed=1, device=CPU), ParallelConfig(tensor=2))
    with pytest.raises(UserError, match=r"num_units = 2 .* parallel\.tensor = 4 does not divide"):
        require_cuttable(recipe, TrainState(recipe, seed=1, device=CPU), ParallelConfig(tensor=4))
    with pytest.raises(UserError, match=r"add cuts\(model\) to the recipe"):
        require_cuttable(Tiny(), TrainState(Tiny(), seed=1, device=CPU), ParallelConfig(tensor=2))
