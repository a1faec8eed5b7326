"""`[parallel]`: how a model is spread over ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from training.config.checks import require
from training.config.launch import LaunchConfig
from training.config.train import TrainConfig
from training.layout import Schedule, in_shards, in_stages


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a model is spread over ranks. Nothing here changes the result but for `tensor`, and with it `sequences`."""

    shard: int = 1
    """So many ranks together keep weights, gradients and optimizer, a part each; there are replicas of them as far as
    there are ranks. 1: each has all."""
    pipeline: int = 1
    """So many ranks together have consecutive parts of the model, one each, likewise; with `tensor`, so many groups of
    ranks. Not together with `shard`."""
    schedule: Schedule = "1f1b"
    """Of a pipeline: in which order its ranks go forward and back."""
    tensor: int = 1
    """So many ranks together have the matrices of the model, or of its stage, a part of each, likewise. Not together
    with `shard`. The bits are those of so many parts, so a run of one number of them is another than one of another."""
    sequences: Literal["parts", "whole"] = "parts"
    """With `tensor`: what each rank computes between the blocks' matrices, of its part of each sequence, or of all. The
    bits hang on that, too."""
    copy_every_steps: int = 0
    """With `shard`: after so many steps each rank keeps a copy of its part in its node's memory, and one of a part of
    another node, so that no node that is lost takes the steps since with it. 0: the next group begins at the newest
    checkpoint."""

    def __post_init__(self) -> None:
        require(self.copy_every_steps >= 0, "parallel.copy_every_steps", "must be at least 0")
        for name, number in self._numbers.items():
            require(number >= 1, f"parallel.{name}", "must be at least 1")
        for name, other in (("pipeline", "shard"), ("tensor", "shard")):
            require(
                1 in (self._numbers[name], self._numbers[other]),
                f"parallel.{name}",
                f"= {self._numbers[name]} does not go with parallel.{other} = {self._numbers[other]} yet: set one of"
                " them to 1",
            )

    @property
    def _numbers(self) -> dict[str, int]:
        return {"shard": self.shard, "pipeline": self.pipeline, "tensor": self.tensor}

    @property
    def maybe_spread(self) -> str | None:
        """The setting by which a rank has a part of the state alone; None: each has all of it."""
        return next((name for name, number in self._numbers.items() if number > 1), None)

    @property
    def is_spread(self) -> bool:
        return self.maybe_spread is not None

    def determining(self) -> dict[str, Any]:
        """What decides the result: nothing, unless that is another than one process's."""
        return {"tensor": self.tensor, "sequences": self.sequences} if self.tensor > 1 else {}

    def nodes_per_replica(self, launch: LaunchConfig) -> int:
        """A group has a multiple of so many: of others it makes something by itself."""
        return self.tensor // math.gcd(self.tensor, launch.processes_per_node)

    def on(self, num_ranks: int, train: TrainConfig) -> ParallelConfig:
        """As a group does it that has fewer ranks than was thought, or more. Raises `UserError` if it cannot."""
        pipeline = in_stages(num_ranks, self.pipeline, tensor=self.tensor).pipeline
        has_whole_rounds = pipeline > 1 and train.virtual_workers % pipeline == 0
        return replace(
            self,
            shard=in_shards(num_ranks, self.shard).shard,
            pipeline=pipeline,
            schedule=self.schedule if has_whole_rounds or self.schedule != "interleaved" else "1f1b",
            copy_every_steps=0,  # of a launcher of one's own: no agent holds memory for the next group
        )

    def require_fit(self, train: TrainConfig, launch: LaunchConfig) -> None:
        """Raises `UserError` naming what does not go with it."""
        require(
            not self.copy_every_steps or self.shard > 1,
            "parallel.copy_every_steps",
            f"= {self.copy_every_steps} is for a state in shards: set parallel.shard, or this to 0 (replicas need no"
            " copies, and of stages of a pipeline there are none yet)",
        )
        if self.is_spread:
            self._require_fit(train, launch)
        require(
            self.pipeline == 1 or self.schedule != "interleaved" or train.virtual_workers % self.pipeline == 0,
            "parallel.schedule",
            f"= 'interleaved' needs train.virtual_workers as a multiple of parallel.pipeline = {self.pipeline}, and"
            f" it is {train.virtual_workers}: change one of the three",
        )

    def _require_fit(self, train: TrainConfig, launch: LaunchConfig) -> None:
        spread = {name: number for name, number in self._numbers.items() if number > 1}
        field = " × ".join(f"parallel.{name}" for name in spread)
        shown = " × ".join(map(str, spread.values()))
        num_ranks = launch.nodes * launch.processes_per_node
        for is_fit, complaint in (
            (train.mode == "exact", "needs train.mode = 'exact'"),
            (train.strategy == "all_reduce", "needs train.strategy = 'all_reduce'"),
            (not launch.keep_spares, "needs launch.keep_spares = false: a spare takes the memory of a whole state"),
            (
                num_ranks % math.prod(spread.values()) == 0,
                f"does not divide launch.nodes × launch.processes_per_node = {num_ranks}: change one of them",
            ),
        ):
            require(is_fit, field, f"= {shown} {complaint}")
