"""The preset, as frozen dataclasses that say what is wrong with their values. training.preset_file reads one."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from training.documents import canonical_json, read_json
from training.errors import DamagedError, UserError
from training.layout import Schedule, in_shards, in_stages, in_tensors


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to read and how to shard it."""

    name: str
    """Name of the dataset: its folder in the bucket."""
    source: str
    """A file or folder: a path, `s3://bucket/prefix`, `package://PACKAGE/path` or `stdlib://`."""
    format: Literal["files", "folders", "jsonl", "csv", "parquet", "webdataset"]
    """What is a record: a file; a file whose first folder is its label; a line (`.gz` is unpacked); a row; a group of
    members of a tar archive."""
    glob: str = "*"
    """Which files of a folder count, by their names alone (`*.csv`), however deep they lie."""
    exclude: tuple[str, ...] = ()
    """Folders, by name, that do not count."""
    test_percent: int = 10
    """Share of the records held out, chosen by a hash of each record's bytes: equal records never part."""
    shard_bytes: int = 8 * 2**20 - 2**16
    """About how many bytes of samples make a shard. With its header it then fits one chunk of 8 MiB, as many stores cut
    objects."""
    partition_bytes: int = 32 * 2**20

    def __post_init__(self) -> None:
        require_name("data.name", self.name)
        require("/" not in self.glob, "data.glob", f"= {self.glob!r} is compared with files' names: without folders")
        require(0 < self.test_percent < 100, "data.test_percent", "must lie between 1 and 99")
        require(self.shard_bytes >= 1024, "data.shard_bytes", "must be at least 1024")
        require(self.partition_bytes >= 1024, "data.partition_bytes", "must be at least 1024")


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


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """On what it runs. Nothing here changes the result."""

    nodes: int = 2
    min_nodes: int = 1
    """Training goes on with so many, and takes in the others when they are back."""
    processes_per_node: int = 1
    cpus_per_node: int = 0
    """This, memory, GPUs and time are asked of an engine that has a queue; 0 is as that sees fit."""
    memory_bytes_per_node: int = 0
    gpus_per_node: int = 0
    shard_nodes: int = 0
    """On so many is the source sharded first, by an engine that has more than this machine (0: by the stage itself)."""
    time_limit_seconds: int = 0
    """After which a node is given back, and asked for again: for engines that want to know."""
    deadline_seconds: int = 0
    """The run is to be done so long after it began; an alert says when it will not be (0: whenever it is)."""
    priority: str = ""
    """One in [slurm.priorities] of unbroken.toml; in manifests for Kubernetes (`runs render`), a PriorityClass."""
    join_seconds: float = 10.0
    """How long the first group waits for nodes beyond `min_nodes`."""
    silence_seconds: float = 3.0
    """After which a node that says nothing counts as lost."""
    hang_seconds: float = 30.0
    """After which a rank without a sign of life is replaced."""
    grace_seconds: float = 10.0
    """What a preempted node takes at most for a last checkpoint."""
    collective_timeout_seconds: int = 60
    balance_seconds: float = 5.0
    """Ranks of different speed get virtual workers in proportion: over so many seconds their paces are compared before
    that changes. 0: all have the same number."""
    max_restarts: int = 20
    keep_spares: bool = False
    """For each rank of a node, one more process that has made its model and takes the place of one that dies at once.
    It takes the memory of a state."""
    server_nodes: int = 0
    """So many nodes, the last ones, have the servers and compute nothing; 0: who computes has them. One node computes
    in any case."""
    servers: int = 2
    """Of train.strategy = "parameter_server": into so many shards the parameters are cut."""
    server_replicas: int = 2
    """So many ranks hold each of these, as far as there are ranks; on different nodes, if there are. Only if all of
    them die at once, the steps since the newest checkpoint are done again."""
    max_quarantined: int = 10
    """With `--quarantine`: so many records are left out at most that make the training fail. (The run without them is
    another one, of another dataset version.)"""
    data_workers: int = 0
    """Processes per rank that read and decode (0: threads of the rank itself)."""
    evaluate_processes: int = 1
    """So many processes of the evaluate stage's machine share the scoring of the held-out samples."""
    cache_memory_bytes: int = 1 << 30
    """Shards kept in memory by a rank, or by each of its `data_workers`."""
    cache_disk_bytes: int = 16 << 30
    """Shards kept on disk beyond that, in unnamed files under TMPDIR; the last tenth of the disk is left alone."""

    def __post_init__(self) -> None:
        require(self.nodes >= 1, "launch.nodes", "must be at least 1")
        require(1 <= self.min_nodes <= self.nodes, "launch.min_nodes", "must lie between 1 and launch.nodes")
        for name in (
            "cpus_per_node",
            "memory_bytes_per_node",
            "gpus_per_node",
            "shard_nodes",
            "time_limit_seconds",
            "deadline_seconds",
        ):
            require(getattr(self, name) >= 0, f"launch.{name}", "must not be negative")
        require(self.join_seconds >= 0, "launch.join_seconds", "must not be negative")
        require(self.silence_seconds >= 0.5, "launch.silence_seconds", "must be at least 0.5")
        require(self.hang_seconds >= 1, "launch.hang_seconds", "must be at least 1")
        require(self.grace_seconds >= 0, "launch.grace_seconds", "must not be negative")
        require(self.processes_per_node >= 1, "launch.processes_per_node", "must be at least 1")
        require(self.collective_timeout_seconds >= 5, "launch.collective_timeout_seconds", "must be at least 5")
        require(self.balance_seconds >= 0, "launch.balance_seconds", "must not be negative (0: never)")
        require(self.max_restarts >= 0, "launch.max_restarts", "must not be negative")
        require(
            0 <= self.server_nodes < self.nodes,
            "launch.server_nodes",
            f"= {self.server_nodes} must leave one of launch.nodes = {self.nodes} to compute",
        )
        require(self.servers >= 1, "launch.servers", "must be at least 1")
        require(self.server_replicas >= 1, "launch.server_replicas", "must be at least 1")
        require(self.max_quarantined >= 0, "launch.max_quarantined", "must not be negative")
        require(self.data_workers >= 0, "launch.data_workers", "must not be negative")
        require(self.evaluate_processes >= 1, "launch.evaluate_processes", "must be at least 1")
        require(self.cache_memory_bytes >= 0, "launch.cache_memory_bytes", "must not be negative")
        require(self.cache_disk_bytes >= 0, "launch.cache_disk_bytes", "must not be negative")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a model is spread over ranks. Nothing here changes the result but for `tensor`, and with it `sequences`."""

    shard: int = 1
    """So many ranks together keep weights, gradients and optimizer, a part each; there are replicas of them as far as
    there are ranks. 1: each has all."""
    pipeline: int = 1
    """So many ranks together have consecutive parts of the model, one each, likewise. Not together with `shard`."""
    schedule: Schedule = "1f1b"
    """Of a pipeline: in which order its ranks go forward and back."""
    tensor: int = 1
    """So many ranks together have the matrices of the model, a part of each, likewise. Not together with the others.
    The bits are those of so many parts, so a run of one number of them is another than one of another."""
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
        for name, other in (("pipeline", "shard"), ("tensor", "shard"), ("tensor", "pipeline")):
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
        in_tensors(num_ranks, self.tensor)
        pipeline = in_stages(num_ranks, self.pipeline).pipeline
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
        for name, number in self._numbers.items():
            if number > 1:
                self._require_fit(f"parallel.{name}", number, train, launch)
        require(
            self.pipeline == 1 or self.schedule != "interleaved" or train.virtual_workers % self.pipeline == 0,
            "parallel.schedule",
            f"= 'interleaved' needs train.virtual_workers as a multiple of parallel.pipeline = {self.pipeline}, and"
            f" it is {train.virtual_workers}: change one of the three",
        )

    def _require_fit(self, field: str, number: int, train: TrainConfig, launch: LaunchConfig) -> None:
        num_ranks = launch.nodes * launch.processes_per_node
        for is_fit, complaint in (
            (train.mode == "exact", "needs train.mode = 'exact'"),
            (train.strategy == "all_reduce", "needs train.strategy = 'all_reduce'"),
            (not launch.keep_spares, "needs launch.keep_spares = false: a spare takes the memory of a whole state"),
            (
                num_ranks % number == 0,
                f"does not divide launch.nodes × launch.processes_per_node = {num_ranks}: change one of the three",
            ),
        ):
            require(is_fit, field, f"= {number} {complaint}")


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One TOML file: everything that a run is a function of, and on what it runs."""

    name: str
    """Name of the model in the registry and of the experiment."""
    recipe: str
    """`module:Class`, found beside the preset or among the installed packages."""
    data: DataConfig
    train: TrainConfig
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    seed: int = 0
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    """The recipe's own fields."""
    folder: str = ""
    """Where the preset's file lies: relative sources and recipe modules are looked for there. Not a key."""

    def __post_init__(self) -> None:
        require_name("name", self.name)
        require(0 <= self.seed < 2**63, "seed", "must lie between 0 and 2^63")
        require(self.recipe.count(":") == 1, "recipe", 'must read "module:Class"')
        _require_plain("hyperparameters", self.hyperparameters)
        require(
            not self.launch.server_nodes or self.train.strategy == "parameter_server",
            "launch.server_nodes",
            "needs train.strategy = 'parameter_server'",
        )
        for name, due in (("server_nodes", 0), ("server_replicas", 1)) if self.train.staleness else ():
            require(
                getattr(self.launch, name) == due,
                f"launch.{name}",
                f"must be {due} with train.staleness: ranks that compute have the shards, each once, and if one is lost"
                " all go back to the newest checkpoint",
            )
        num_computing = (self.launch.nodes - self.launch.server_nodes) * self.launch.processes_per_node
        times = f" × parallel.tensor = {self.parallel.tensor}" if self.parallel.tensor > 1 else ""
        require(
            num_computing <= self.train.virtual_workers * self.parallel.tensor,
            "launch.nodes",
            f"gives {num_computing} ranks, more than train.virtual_workers = {self.train.virtual_workers}{times}",
        )
        self.parallel.require_fit(self.train, self.launch)

    def determining(self) -> dict[str, Any]:
        """The part that decides the trained weights: the run key is made of it, data, code and initial weights."""
        train = asdict(self.train)
        for name in (
            "checkpoint_every_steps",
            "keep_checkpoints",
            "keep_every_steps",
            "digest_every_steps",
            "strategy",
            "validate_every_steps",
            "warm_start",
        ):
            del train[name]
        if not self.train.staleness:
            del train["staleness"]  # all that is exact has the same key
        parallel = self.parallel.determining()
        return {
            "train": train,
            "hyperparameters": self.hyperparameters,
            "seed": self.seed,
            **({"parallel": parallel} if parallel else {}),
        }

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _require_plain(name: str, value: Any) -> None:
    """As a job on the store can say it."""
    try:
        read_json(canonical_json(value), what=name)
    except (TypeError, ValueError, RecursionError, DamagedError) as error:
        raise UserError(f"{name} must be numbers, texts, true, false, lists and tables of these: {error}") from error


def require(condition: bool, name: str, complaint: str) -> None:
    """Raises `UserError` about that field if not."""
    if not condition:
        raise UserError(f"{name} {complaint}")


def require_name(name: str, value: str) -> None:
    good = value and len(value) <= 64 and all(c.isascii() and (c.isalnum() or c in "-_") for c in value)
    require(bool(good), name, f"= {value!r} must be 1 to 64 letters, digits, '-' or '_'")
