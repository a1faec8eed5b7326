"""The preset as a whole, and what of it decides a result."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from training.config.checks import require, require_name
from training.config.data import DataConfig
from training.config.launch import LaunchConfig
from training.config.parallel import ParallelConfig
from training.config.train import EvaluateConfig, TrainConfig
from training.documents import canonical_json, read_json
from training.errors import DamagedError, UserError


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
