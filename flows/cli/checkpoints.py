"""`ckpt`: look at a run's checkpoints, prove them, carry one elsewhere."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from flows.cli.browse import Key
from flows.cli.output import print_json, print_table
from flows.cli.stack import Json, open_run, open_store_to_sign
from training.errors import DamagedError, InfrastructureError, UserError

if TYPE_CHECKING:
    from training.runs.record import CheckpointRef, Record, RunRecord

Step = Annotated[int | None, Parameter(help="The checkpoint of this step; else the newest.")]

ckpt = App(name="ckpt", help="Look at a run's checkpoints, prove them, carry one elsewhere.")


def add_to(app: App) -> None:
    app.command(ckpt)


@ckpt.command(name="ls")
def ckpt_ls(key: Key, *, json: Json = False) -> None:
    """A run's proven checkpoints, and those found damaged."""
    record = open_run(key).read()
    if json:
        print_json(
            {
                "checkpoints": [asdict(c) for c in record.checkpoints],
                "quarantined": [asdict(q) for q in record.quarantined],
            }
        )
        return
    rows = [[c.step, c.token, c.sha256[:12], "proven"] for c in record.checkpoints]
    rows += [[q.checkpoint.step, q.checkpoint.token, q.checkpoint.sha256[:12], q.reason] for q in record.quarantined]
    print_table(["step", "token", "sha256", "state"], rows)


@ckpt.command(name="show")
def ckpt_show(key: Key, *, step: Step = None) -> None:
    """Print a checkpoint's manifest: every tensor's dtype and shape, and which part holds which slice of it."""
    from training.checkpoints.checkpoint import load_manifest

    run, reference = _find(key, step)
    print_json(asdict(load_manifest(run.store, run.prefix(run.read()), reference)))


@ckpt.command(name="verify")
def ckpt_verify(key: Key, *, json: Json = False) -> None:
    """Read every object of every checkpoint of a run, and compare its sha256. Exit code 6 names what is damaged."""
    from training.checkpoints.checkpoint import load_checkpoint

    run = open_run(key)
    record = run.read()
    rows = []
    for reference in record.checkpoints:
        maybe_damage = None
        try:
            load_checkpoint(run.store, run.prefix(record), reference)
        except DamagedError as error:
            if reference not in run.read().checkpoints:  # the run goes on, and has let go of it since
                continue
            maybe_damage = str(error)
        rows.append({"step": reference.step, "sha256": reference.sha256, "damage": maybe_damage})
    if json:
        print_json(rows)
    else:
        print_table(["step", "sha256", "state"], [[r["step"], r["sha256"], r["damage"] or "whole"] for r in rows])
    damaged = [str(row["step"]) for row in rows if row["damage"]]
    if damaged:
        raise DamagedError(f"damaged checkpoints of steps {', '.join(damaged)}: a run that goes on takes one before")


@ckpt.command(name="sign")
def ckpt_sign(key: Key) -> None:
    """Sign a run's checkpoints and result with this machine's key, once all bytes are proven: you vouch for them."""
    from tasks.lineage.verify import require_result
    from training.checkpoints import trust
    from training.checkpoints.checkpoint import load_checkpoint
    from training.runs.finding import find_run

    run = find_run(open_store_to_sign(), key)
    before = run.read()
    vouched = trust.resigned(run, before)
    if vouched.result is not None and vouched.result.checkpoint not in vouched.checkpoints:
        raise DamagedError(f"run {run.run_key[:12]}: the record has no more the checkpoint of its result")
    for reference in vouched.checkpoints:
        tensors = load_checkpoint(run.store, run.prefix(before), reference)
        if vouched.result is not None and vouched.result.checkpoint == reference:
            require_result(vouched, reference, tensors)
    for reference in vouched.checkpoints:
        print(f"checkpoint of step {reference.step}: manifest sha256 {reference.sha256}")
    if before.result is not None:
        print(f"result: weights sha256 {before.result.weights_sha256}")

    def signed(newest: Record) -> Record:
        if trust.what_is_signed(newest) != trust.what_is_signed(before):
            raise InfrastructureError(f"run {run.run_key[:12]} went on meanwhile, and nothing was signed: try again")
        return trust.resigned(run, newest)

    run.update(signed)
    print("signed")


@ckpt.command(name="export")
def ckpt_export(
    key: Key,
    *,
    to: Annotated[Path, Parameter(help="A new file, NAME.safetensors.")],
    step: Step = None,
    state: Annotated[bool, Parameter(negative="", help="The optimizer's state as well, under its full names.")] = False,
) -> None:
    """Write a checkpoint's weights as one safetensors file: a state dict that plain PyTorch loads.

    `model.load_state_dict(safetensors.torch.load_file(FILE))`
    """
    import safetensors.torch

    from training.checkpoints.checkpoint import load_checkpoint

    run, reference = _find(key, step)
    if to.name and os.path.lexists(to):
        raise UserError(f"{to} exists: name a new file")
    if not to.name or not to.parent.is_dir():
        raise UserError(f"--to {str(to)!r}: name a file in a folder that is there")
    tensors = load_checkpoint(run.store, run.prefix(run.read()), reference)
    if not state:
        tensors = {n.removeprefix("model."): tensor for n, tensor in tensors.items() if n.startswith("model.")}
    about = {"run": run.run_key, "step": str(reference.step), "checkpoint": reference.sha256}
    try:
        to.write_bytes(safetensors.torch.save(tensors, metadata=about))
    except OSError as error:
        with suppress(OSError):
            to.unlink()
        raise InfrastructureError(f"cannot write {to}: {error}") from error
    print(f"{len(tensors)} tensors of step {reference.step} are in {to}")


def _find(key: str, step: int | None) -> tuple[RunRecord, CheckpointRef]:
    run = open_run(key)
    found = run.read().checkpoints
    wanted = [reference for reference in found if step in (None, reference.step)]
    if not wanted:
        there = ", ".join(str(reference.step) for reference in found) or "none"
        raise UserError(
            f"run {run.run_key[:12]} has no checkpoint of step {step}: there is {there}"
            if step is not None
            else f"run {run.run_key[:12]} has no checkpoint yet"
        )
    return run, wanted[-1]
