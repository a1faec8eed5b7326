"""Where a drill takes place: a corner of the store of its own, with part of the data, and the local engine.

Its runs have a seed that no other run has. So nothing of it is found by, or collides with, runs of the user's own.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import psutil

from infra.launcher import JobSpec
from infra.local import supervisor
from infra.local.files import write_whole
from infra.local.launcher import LocalLauncher
from infra.settings import Settings
from infra.store import store_location
from training.config import Preset
from training.data.manifest import Manifest, ShardInfo, load_manifest, manifest_key, shard_key
from training.recipe import Recipe
from training.runs.job import Job, agent_command, agent_environment, store_job
from training.runs.record import RunRecord, run_key, start_fresh
from training.s3.objectstore import Store, StoreLocation

DATA_BYTES = 64 << 20
"""Of training data at most, but for the last shard."""
NUM_AT_ONCE = 8


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One training run of the drill."""

    run: RunRecord
    generation: int
    token_before: int
    """The record's before there is any group: a fresh run goes on from the tokens of the one before it."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A preset, as the drill trains it, and what it is trained on."""

    settings: Settings
    store: Store
    """The drill's own corner."""
    preset: Preset
    recipe: Recipe
    dataset_digest: str
    environment: Mapping[str, str] = field(default_factory=dict)
    """More variables for the agents."""

    @property
    def launcher(self) -> LocalLauncher:
        return LocalLauncher(self.settings.home)

    @property
    def key(self) -> str:
        return run_key(recipe=self.recipe, preset=self.preset, dataset_digest=self.dataset_digest)

    def begin(self, *, endpoint: str | None = None) -> Trial:
        """Begin the preset's run anew; its agents reach the store at `endpoint`, if that is another."""
        run = RunRecord(self.store, self.key)
        record = run.create_if_missing()
        if record.token:
            record = run.update(start_fresh)
        location = replace(self.store.location, endpoint=endpoint or self.store.location.endpoint)
        job = Job(
            key=self.key,
            generation=record.generation,
            preset=self.preset,
            dataset_digest=self.dataset_digest,
            location=location,
        )
        self.launcher.submit(
            JobSpec(
                key=self.key,
                num_nodes=self.preset.launch.nodes,
                command=agent_command(self.key, store_job(self.store, job)),
                environment={**agent_environment(location), **self.environment},
                store=location.uri(),
                generation=record.generation,
            )
        )
        return Trial(run=run, generation=record.generation, token_before=record.token)

    def end(self) -> None:
        """Have no process of the run left."""
        self.launcher.cancel(self.key)

    def processes(self, module: str = "", *, node: int | None = None) -> list[psutil.Process]:
        """The run's processes on this machine: those of a module, of a node, or all."""
        found = []
        for process in supervisor.stack_processes(self.settings.home):
            with contextlib.suppress(psutil.Error):  # it ended just now
                variables = process.environ()
                is_ours = variables.get("SUPERVISOR_GROUP_NAME") == self.key
                is_there = node is None or variables.get("SUPERVISOR_PROCESS_NAME") == f"node{node}"
                if is_ours and is_there and (not module or module in process.cmdline()):
                    found.append(process)
        return found

    def agent(self, node: int) -> psutil.Process:
        """Raises `LookupError` if it does not live."""
        return _busiest(self.processes("training.cluster.agent", node=node), f"agent of node {node}")

    def rank(self, node: int) -> psutil.Process:
        """One that trains, not a spare. Raises `LookupError` if there is none."""
        return _busiest(self.processes("training.cluster.worker", node=node), f"rank on node {node}")


def _busiest(processes: list[psutil.Process], what: str) -> psutil.Process:
    if not processes:
        raise LookupError(f"there is no {what}")
    return max(processes, key=_cpu_seconds)


def _cpu_seconds(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:  # it ended just now
        return 0.0
    return float(times.user + times.system)


def corner_of(settings: Settings, drill_id: str) -> Store:
    """The drill's own part of the store."""
    location: StoreLocation = store_location(settings)
    return Store(replace(location, prefix=f"{location.prefix}drills/{drill_id}/"))


def copy_part(source: Store, target: Store, dataset: str, digest: str) -> str:
    """A version with the first shards of a dataset version, in the drill's own corner. Returns its digest.

    Raises `DamagedError` naming the shard that is not what its name says.
    """
    whole = load_manifest(source, dataset, digest)
    splits = {"train": _first(whole.splits["train"], DATA_BYTES), "test": whole.splits["test"][:1]}
    part = Manifest(fields=whole.fields, splits=splits, classes=whole.classes)  # type: ignore[arg-type]  # keys are splits

    def copy(shard: ShardInfo) -> None:
        key = shard_key(dataset, shard.sha256)
        target.put_immutable(key, source.get_proven(key, sha256=shard.sha256))

    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        list(pool.map(copy, [shard for shards in splits.values() for shard in shards]))
    target.put_immutable(manifest_key(dataset, part.digest), part.to_bytes())
    return part.digest


def _first(shards: tuple[ShardInfo, ...], num_bytes: int) -> tuple[ShardInfo, ...]:
    taken: list[ShardInfo] = []
    for shard in shards:
        if taken and sum(s.num_bytes for s in taken) + shard.num_bytes > num_bytes:
            break
        taken.append(shard)
    return tuple(taken)


def note(settings: Settings, drill_id: str, *keys: str) -> None:
    """What has to be cleared away if this process cannot do it itself."""
    notes = _read_notes(settings)
    notes[drill_id] = [*notes.get(drill_id, []), *keys]
    write_whole(settings.home / "drill.json", json.dumps(notes))


def clear(settings: Settings) -> None:
    """Leave no process and no object of any drill that this stack's home knows of."""
    for drill_id, keys in _read_notes(settings).items():
        for key in keys:
            LocalLauncher(settings.home).cancel(key)
        corner = corner_of(settings, drill_id)
        with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
            list(pool.map(corner.delete, [key for key, _ in corner.list_keys("")]))
    (settings.home / "drill.json").unlink(missing_ok=True)


def _read_notes(settings: Settings) -> dict[str, list[str]]:
    path = settings.home / "drill.json"
    found: dict[str, list[str]] = json.loads(path.read_text()) if path.exists() else {}
    return found
