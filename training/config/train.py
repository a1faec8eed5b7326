"""`[train]` and `[evaluate]`: what is trained how long, and measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from training.config.checks import require
from training.errors import UserError


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What is computed. Everything here decides the result but for when checkpoints,
    digests and validations are made."""

    steps: int
    batch_size: int
    """Samples per step, over all virtual workers."""
    virtual_workers: int = 8
    """The batch is always split over these, whoever computes them: so the ranks cannot change the result."""
    shuffle_window_shards: int = 4
    """Each virtual worker shuffles inside windows of so many shards: more mix better, and take more memory."""
    clip_norm: float | None = None
    mode: Literal["exact", "fast"] = "exact"
    """`fast` is plain DistributedDataParallel: the same order of data, and no promise on bits."""
    strategy: Literal["all_reduce", "parameter_server"] = "all_reduce"
    """Who makes the optimizer's step: every rank the whole of it, or servers a part each (`launch.servers`). The bits
    are the same."""
    staleness: int = 0
    """With servers: ranks may be so many steps ahead of the slowest, and the result hangs on who was quick. 0: all make
    each step together, and the result is exact."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """`bfloat16`: the loss is computed under torch.autocast; weights, gradients and sums stay float32."""
    warm_start: str | None = None
    """Begin with the weights of a registered model: `NAME@ALIAS` or `NAME/VERSION`. What decides is these weights."""
    validate_every_steps: int | None = None
    """Score the held-out samples every so many steps; the `[evaluate]` table says how many, and in which batches."""
    checkpoint_every_steps: int = 50
    keep_checkpoints: int = 3
    """So many of the newest are kept."""
    keep_every_steps: int | None = None
    """The checkpoints of every so many steps are kept for ever."""
    digest_every_steps: int | None = None
    """A digest of the weights is noted every so many steps, in exact mode (0: never; None: as often as costs next to
    nothing)."""

    def __post_init__(self) -> None:
        require(self.steps >= 1, "train.steps", "must be at least 1")
        require(1 <= self.virtual_workers <= 65_536, "train.virtual_workers", "must lie between 1 and 65536")
        require(self.shuffle_window_shards >= 1, "train.shuffle_window_shards", "must be at least 1")
        require(self.checkpoint_every_steps >= 1, "train.checkpoint_every_steps", "must be at least 1")
        require(
            self.strategy == "all_reduce" or self.mode == "exact",
            "train.strategy",
            "'parameter_server' needs train.mode = 'exact'",
        )
        require(self.staleness >= 0, "train.staleness", "must not be negative (0: all ranks make each step together)")
        require(
            self.staleness == 0 or self.strategy == "parameter_server",
            "train.staleness",
            f"= {self.staleness} needs train.strategy = 'parameter_server'",
        )
        require(self.keep_checkpoints >= 1, "train.keep_checkpoints", "must be at least 1")
        require(
            self.keep_every_steps is None or self.keep_every_steps % self.checkpoint_every_steps == 0,
            "train.keep_every_steps",
            f"must be a multiple of train.checkpoint_every_steps = {self.checkpoint_every_steps}",
        )
        require(
            self.keep_every_steps is None or self.keep_every_steps >= 1, "train.keep_every_steps", "must be positive"
        )
        require(
            self.validate_every_steps is None or self.validate_every_steps >= 1,
            "train.validate_every_steps",
            "must be at least 1",
        )
        require(
            self.digest_every_steps is None or self.digest_every_steps >= 0,
            "train.digest_every_steps",
            "must not be negative (0: never)",
        )
        require(self.clip_norm is None or self.clip_norm > 0, "train.clip_norm", "must be positive")
        if self.batch_size < 1 or self.batch_size % self.virtual_workers:
            near = max(1, round(self.batch_size / self.virtual_workers)) * self.virtual_workers
            raise UserError(
                f"train.batch_size = {self.batch_size} is not divisible by train.virtual_workers ="
                f" {self.virtual_workers}: set train.batch_size to {near}, or change train.virtual_workers"
            )

    @property
    def maybe_inexact(self) -> str | None:
        """The setting by which the result is no function of the run key, so that a run cannot be repeated; None: it is
        one."""
        if self.mode == "fast":
            return "train.mode = 'fast'"
        return f"train.staleness = {self.staleness}" if self.staleness else None


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How the held-out samples are judged."""

    batch_size: int = 256
    max_samples: int | None = None
    """Judge only the first so many of the held-out samples."""
    bootstrap_samples: int = 1000
    confidence: float = 0.95

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "evaluate.batch_size", "must be at least 1")
        require(self.max_samples is None or self.max_samples >= 1, "evaluate.max_samples", "must be at least 1")
        require(self.bootstrap_samples >= 100, "evaluate.bootstrap_samples", "must be at least 100")
        require(0.5 <= self.confidence < 1, "evaluate.confidence", "must lie between 0.5 and 1")
