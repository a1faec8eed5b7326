"""`runs`, `models`: look at what is stored."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from flows.cli.output import print_json, print_table
from flows.cli.stack import Json, open_run, open_store
from training.errors import DamagedError, UserError

if TYPE_CHECKING:
    from training.runs.record import Record, RunRecord

COLUMNS = ("key", "state", "checkpoint_step", "attempts", "tracking_run_id", "weights_sha256", "inexact", "failure")
Key = Annotated[str, Parameter(help="A run key, or the beginning of one.")]

runs = App(name="runs", help="Look at runs and their logs, cancel or remove them; manifests for a cluster.")
models = App(name="models", help="Look at registered models, and say which one is champion.")


def add_to(app: App) -> None:
    for group in (runs, models):
        app.command(group)


@runs.command(name="ls")
def runs_ls(*, json: Json = False) -> None:
    """Every run: its key, state, steps and restarts."""
    from training.runs.finding import all_runs

    rows = list(filter(None, map(_row, all_runs(open_store()))))
    if json:
        print_json(rows)
        return
    columns = ["key", "state", "checkpoint_step", "attempts", "tracking_run_id", "failure"]
    print_table(
        columns, [[row["key"][:12], *("" if row[name] is None else row[name] for name in columns[1:])] for row in rows]
    )


@runs.command(name="show")
def runs_show(key: Key, *, json: Json = False) -> None:
    """One run: its state, the groups that trained it, why nodes left, and where the time went."""
    from training.runs.goodput import account
    from training.runs.history import events_of

    run = open_run(key)
    record = run.read()
    goodput = account(events_of(run, record), record.resume_steps)
    departures = [asdict(departure) for departure in record.departures]
    if json:
        print_json({**_summary(record), "departures": departures, "seconds": goodput.seconds, "goodput": goodput.share})
        return
    print_table(["what", "value"], [[name, value] for name, value in _summary(record).items() if value is not None])
    if departures:
        columns = ["token", "node", "step", "cause"]
        print_table(columns, [[departure[name] for name in columns] for departure in departures])
    print_table(
        ["time went into", "seconds", "share"],
        [
            [use, f"{spent:.1f}", f"{spent / goodput.wall_seconds:.1%}"]
            for use, spent in goodput.seconds.items()
            if spent
        ],
    )


@runs.command(name="logs")
def runs_logs(key: Key) -> None:
    """Print the logs of a run's nodes on this machine."""
    from infra.engines import make_launcher
    from infra.settings import load_settings

    run = open_run(key)
    logs = make_launcher(load_settings()).logs(run.run_key)
    if not logs:
        raise UserError(f"run {run.run_key[:12]} left no log on this machine")
    for path in logs:
        print(f"==> {path} <==\n{path.read_text(errors='replace')}")


@runs.command(name="cancel")
def runs_cancel(key: Key) -> None:
    """Stop a run. Its checkpoints stay, and starting it again goes on from them."""
    from infra.engines import make_launcher
    from infra.settings import load_settings

    run = open_run(key)
    make_launcher(load_settings()).cancel(run.run_key)
    print(f"run {run.run_key[:12]} has no process left")


@runs.command(name="rm")
def runs_rm(
    key: Key,
    *,
    force: Annotated[bool, Parameter(negative="", help="Although a registered model came from it.")] = False,
) -> None:
    """Delete a run's checkpoints, events and record. Refused while the engine has it, or if a model came from it."""
    from infra.engines import make_launcher
    from infra.settings import load_settings

    run = open_run(key)
    if make_launcher(load_settings()).find(run.run_key) is not None:
        raise UserError(f"run {run.run_key[:12]} is at work: cancel it first with `unbroken runs cancel {key}`")
    if not force:
        _require_no_version(run.run_key)
    keys = [name for name, _ in run.store.list_keys(f"runs/{run.run_key}/")]
    for name in sorted(keys, key=lambda name: name == run.object_key):  # the record last: the rest hangs on it
        run.store.delete(name)
    print(f"deleted {len(keys)} objects of run {run.run_key[:12]}")


def _require_no_version(key: str) -> None:
    from tasks.registry import list_versions
    from tasks.stack import open_stack

    for version in list_versions(open_stack()[0].mlflow_uri):
        if version["run_key"] == key:
            raise UserError(
                f"run {key[:12]} gave model {version['name']!r} version {version['version']}, which could then prove no"
                " more where it came from: give --force to delete it all the same"
            )


@models.command(name="ls")
def models_ls(*, json: Json = False) -> None:
    """Every version in the registry, with its aliases and run key."""
    from tasks.registry import list_versions
    from tasks.stack import open_stack

    settings, _ = open_stack()
    rows = list_versions(settings.mlflow_uri)
    if json:
        print_json(rows)
        return
    print_table(
        ["model", "version", "aliases", "run key"],
        [[row["name"], row["version"], ",".join(row["aliases"]), row["run_key"][:12]] for row in rows],
    )


def _row(run: RunRecord) -> dict[str, Any] | None:
    """One damaged record hides no other run."""
    try:
        record = run.find()
    except DamagedError as error:
        return {**dict.fromkeys(COLUMNS), "key": run.run_key, "state": "damaged", "failure": str(error)}
    return _summary(record) if record is not None else None


def _summary(record: Record) -> dict[str, Any]:
    state = "finished" if record.result else "failed" if record.failure else "open"
    return {
        "key": record.key,
        "state": state,
        "checkpoint_step": record.checkpoints[-1].step if record.checkpoints else 0,
        "attempts": len(record.attempt_starts),
        "tracking_run_id": record.tracking_run_id,
        "weights_sha256": record.result.weights_sha256 if record.result else None,
        "inexact": record.result.inexact if record.result else None,
        "failure": record.failure.message if record.failure else None,
    }
