"""What a rank with a part of each matrix reckons by itself: its replica's virtual workers, and who is slow; and what
one rank cannot do again."""

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
from training.runs.job import Job
from training.runs.pace import Straggler
from training.runs.record import Record
from training.s3.objectstore import StoreLocation
from training.tensor_loop import TensorTrainer

PRESET = replace(
    tiny_preset(virtual_workers=6, batch_size=12), launch=LaunchConfig(nodes=4), parallel=ParallelConfig(tensor=2)
)


def trainer(rank: int, world_size: int) -> TensorTrainer:
    made = make_trainer(preset=PRESET, rank=rank, world_size=world_size, kind=TensorTrainer)
    assert isinstance(made, TensorTrainer)
    return made


def test_replicas_share_the_virtual_workers_and_their_ranks_have_the_same() -> None:
    assert [trainer(rank, 4).layout for rank in range(4)] == [Layout(data=2, tensor=2)] * 4
    assert [trainer(rank, 4).balance.shares for rank in range(4)] == [(3, 3)] * 4
    assert trainer(1, 2).balance.shares == (6,)
    with pytest.raises(UserError, match="3 are no multiple of 2"):
        trainer(0, 3)


def test_all_ranks_are_compared() -> None:
    four = trainer(0, 4)
    assert four.straggler([1.0, 1.0, 1.0, 1.0]) is None
    assert four.straggler([1.0, 1.0, 1.0, 2.0]) == Straggler(rank=3, factor=2.0)


def test_one_rank_does_no_steps_again_that_others_did_together() -> None:
    job = Job(
        key="k", generation=0, preset=PRESET, dataset_digest="d", location=StoreLocation(endpoint=None, bucket="b")
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
