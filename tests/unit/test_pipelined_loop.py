"""What a rank of a pipeline reckons by itself: its replica's virtual workers, its part of them, and who is slow."""

from __future__ import annotations

from dataclasses import replace

from tests.unit.tiny import make_trainer, tiny_preset
from training.config import ParallelConfig
from training.layout import Layout
from training.pipelined_loop import PipelinedTrainer
from training.runs.pace import Straggler


def trainer(rank: int, world_size: int, parallel: ParallelConfig) -> PipelinedTrainer:
    preset = tiny_preset(virtual_workers=6, batch_size=12)
    made = make_trainer(
        preset=replace(preset, launch=replace(preset.launch, nodes=4), parallel=parallel),
        rank=rank,
        world_size=world_size,
        kind=PipelinedTrainer,
    )
    assert isinstance(made, PipelinedTrainer)
    return made


def test_replicas_share_the_virtual_workers_and_their_stages_have_the_same() -> None:
    pair = ParallelConfig(pipeline=2)
    assert [trainer(rank, 4, pair).layout for rank in range(4)] == [Layout(data=2, pipeline=2)] * 4
    assert trainer(3, 4, pair).balance.shares == (3, 3)
    assert trainer(3, 4, replace(pair, schedule="interleaved")).balance.shares == (2, 4)
    assert trainer(0, 3, pair).balance.shares == (2, 2, 2)
    assert trainer(0, 3, pair).extras.num_elements == trainer(0, 2, pair).extras.num_elements


def test_stages_are_compared_with_their_like() -> None:
    pair = trainer(0, 4, ParallelConfig(pipeline=2))
    assert pair.straggler([1.0, 9.0, 1.0, 9.0]) is None
    assert pair.straggler([1.0, 9.0, 1.0, 18.0]) == Straggler(rank=3, factor=2.0)
    assert pair.straggler([3.0, 9.0, 1.0, 9.0]) == Straggler(rank=0, factor=3.0)
