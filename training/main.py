"""`torchrun … -m training.main PRESET`: training under a launcher of your own, without engine, agents or tracker.

Each start takes a new token, so that the ranks of an earlier one are fenced off; it goes on from the newest proven
checkpoint, as any other does. The run is the same as that of `unbroken train`, which finds what was done here.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from cyclopts import App, Parameter

from training.cluster import membership
from training.config import Preset
from training.control import Seat
from training.documents import canonical_json, read_document
from training.errors import UnbrokenError, UserError
from training.preset_file import load_preset, parse_override
from training.processes import die_with
from training.runs.events import EventWriter
from training.runs.identity import keep_identity
from training.runs.job import Job, read_job, store_job
from training.runs.record import Record, RunRecord, run_key, trajectory_key, without_failure
from training.s3.objectstore import Store, StoreLocation

LINE_SECONDS = 5.0
app = App(name="torchrun … -m training.main", help=__doc__, version_flags=[])


@app.default
def train(
    preset: Annotated[str, Parameter(help="A built-in preset's name, or a TOML file.")],
    *,
    store: Annotated[str, Parameter(help="Where datasets and runs lie.")] = "s3://unbroken",
    dataset: Annotated[
        str | None, Parameter(help="A dataset version; else the preset's, as it was last sharded.")
    ] = None,
    set_: Annotated[
        list[str] | None, Parameter(name="--set", negative="", help="A preset value to change, as in train.steps=20.")
    ] = None,
) -> None:
    """Train PRESET on the ranks that torchrun started. The data must be sharded: `python -m tasks shard`.

    The store's endpoint, region and credentials come from the environment, as for AWS's own tools.
    """
    launched = Launched.from_environment()
    config = load_preset(preset, dict(parse_override(text) for text in set_ or ()))
    if config.train.warm_start is not None:
        raise UserError("train.warm_start needs the registry: use `unbroken train`")
    config = replace(
        config,
        launch=replace(config.launch, nodes=launched.world_size, processes_per_node=1),
        parallel=config.parallel.on(launched.world_size, config.train),
    )
    on = Store(location_of(store))
    rendezvous = launched.rendezvous()
    if launched.rank == 0:
        rendezvous.set("start", canonical_json(begin(on, config, dataset or config.data.name)))
    start = read_document(rendezvous.get("start"), what="the start")
    if start["token"] is not None:
        _train(read_job(on, start["run_key"], start["job"]), launched.seat(token=start["token"]), rendezvous)
    if launched.rank == 0:
        _print_result(RunRecord(on, start["run_key"]).read())


@dataclass(frozen=True, kw_only=True)
class Launched:
    """What torchrun says of this process."""

    rank: int
    local_rank: int
    world_size: int

    @staticmethod
    def from_environment() -> Launched:
        """Raises `UserError` if nobody launched us."""
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in names if name not in os.environ]
        if missing:
            raise UserError(
                f"{', '.join(missing)} not set: start with `torchrun --nproc-per-node N -m training.main PRESET`"
            )
        rank, local_rank, world_size = (int(os.environ[name]) for name in names[:3])
        return Launched(rank=rank, local_rank=local_rank, world_size=world_size)

    def rendezvous(self) -> Any:
        """The group's store. torchrun may hold one for all its restarts, so each has a corner of its own."""
        from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]  # public, but not listed

        store, _, _ = next(iter(rendezvous("env://")))
        return PrefixStore(f"unbroken/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

    def seat(self, *, token: int) -> Seat:
        return Seat(rank=self.rank, local_rank=self.local_rank, world_size=self.world_size, token=token)


def location_of(uri: str) -> StoreLocation:
    """`s3://BUCKET/PREFIX`, the rest from AWS's environment variables. Raises `UserError`."""
    scheme, _, path = uri.partition("://")
    bucket, _, prefix = path.partition("/")
    if scheme != "s3" or not bucket:
        raise UserError(f"--store {uri!r}: must read s3://BUCKET or s3://BUCKET/PREFIX")
    return StoreLocation(
        endpoint=os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"),
        bucket=bucket,
        prefix=f"{prefix.rstrip('/')}/" if prefix else "",
        region=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1",
    )


def begin(store: Store, preset: Preset, dataset: str) -> dict[str, Any]:
    """Take the run's next token. Returns what all ranks must know; the token is None if the run is finished."""
    from training.checkpoints.continuation import note_sibling
    from training.data.versions import find_version
    from training.recipe import load_recipe

    store.require_bucket()
    _, digest = find_version(store, dataset)
    recipe = load_recipe(preset)
    key = run_key(recipe=recipe, preset=preset, dataset_digest=digest)
    keep_identity(store, key, recipe=recipe, preset=preset, dataset_digest=digest)
    run = RunRecord(store, key)
    run.create_if_missing()
    record = run.update(lambda newest: membership.launched_elsewhere(without_failure(newest)))
    trajectory = trajectory_key(recipe=recipe, preset=preset, dataset_digest=digest)
    note_sibling(store, trajectory, run_key=key, num_steps=preset.train.steps)
    job = Job(key=key, generation=record.generation, preset=preset, dataset_digest=digest, location=store.location)
    token = record.token if record.result is None else None
    return {"run_key": key, "job": store_job(store, job), "token": token}


def _train(job: Job, seat: Seat, rendezvous: Any) -> None:
    from training import rank

    kit = rank.prepare(job, local_rank=seat.local_rank)
    record = job.open_run().read()
    record.require_token(seat.token)
    rank.train(kit, seat, record, rendezvous, make_events=_SpokenEvents)


class _SpokenEvents(EventWriter):
    """Says every few seconds how far the training is."""

    _next_line = 0.0

    def add(self, kind: str, *, step: int, **values: Any) -> None:
        super().add(kind, step=step, **values)
        if kind == "step" and time.monotonic() > self._next_line:
            self._next_line = time.monotonic() + LINE_SECONDS
            print(f"step {step}  loss {values['loss']:.4f}  {values['samples_per_second']:,.0f} samples/s", flush=True)


def _print_result(record: Record) -> None:
    assert record.result is not None
    shown = {
        "run_key": record.key,
        "step": record.result.step,
        "weights_sha256": record.result.weights_sha256,
        "state_sha256": record.result.state_sha256,
    }
    for name, value in shown.items():
        print(f"{name:15} {value}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    die_with(os.getppid())
    code = 0
    try:
        app(arguments)
    except UnbrokenError as error:  # no more collectives after an error, and none waits for the group's threads
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = error.exit_code
    except Exception:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
