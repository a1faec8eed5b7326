"""`[launch]`: on how many nodes, and what they may take."""

from __future__ import annotations

from dataclasses import dataclass

from training.config.checks import require


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
