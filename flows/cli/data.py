"""`data`: look at dataset versions, prove them, take records out, clean up, carry them elsewhere."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter

from flows.cli.output import LiveLine, print_json, print_table
from flows.cli.stack import Json, open_run, open_store
from training.errors import DamagedError, UserError

if TYPE_CHECKING:
    from training.data.manifest import Manifest
    from training.s3.objectstore import Store

Version = Annotated[
    str, Parameter(help="A dataset's name (its newest version), the beginning of a digest, or NAME@BEGINNING.")
]

data = App(name="data", help="Look at datasets, prove them, take records out, clean up, carry them elsewhere.")


def add_to(app: App) -> None:
    app.command(data)


@data.command(name="ls")
def ls(*, json: Json = False) -> None:
    """Every version of every dataset; of each dataset, the one that was sharded last comes last."""
    from training.data.versions import versions_by_time

    store = open_store()
    rows = [
        _row(store, name, digest, f"{written:%Y-%m-%d %H:%M:%S}")
        for name in store.list_folders("datasets/")
        for digest, written in versions_by_time(store, name).items()
    ]
    if json:
        print_json(rows)
        return
    columns = ["name", "digest", "train", "test", "bytes", "sharded"]
    print_table(columns, [[row["name"], row["digest"][:12], *(row[c] for c in columns[2:])] for row in rows])


def _row(store: Store, name: str, digest: str, sharded: str) -> dict[str, Any]:
    """A damaged manifest hides no other version."""
    from training.data.manifest import load_manifest

    try:
        manifest = load_manifest(store, name, digest)
    except DamagedError:
        counts: tuple[Any, ...] = ("damaged", None, None)
    else:
        counts = (manifest.num_samples("train"), manifest.num_samples("test"), manifest.num_bytes())
    return {
        "name": name,
        "digest": digest,
        **dict(zip(("train", "test", "bytes"), counts, strict=True)),
        "sharded": sharded,
    }


@data.command(name="show")
def show(version: Version, *, json: Json = True) -> None:  # for those who ask every verb for it
    """Print a version's manifest: fields, splits and shards. JSON, asked for or not."""
    print_json(_find(open_store(), version)[2].to_json())


@data.command(name="diff")
def diff(a: Version, b: Version, *, json: Json = False) -> None:
    """What version B has that A has not, and the other way round: shards, bytes and samples of each split.

    A sample is known by its id; those that both have under one id with another content are counted as changed.
    """
    from training.data.versions import compare

    store = open_store()
    (name_a, _, manifest_a), (name_b, _, manifest_b) = _find(store, a), _find(store, b)
    rows = [asdict(row) for row in compare(store, (name_a, manifest_a), (name_b, manifest_b))]
    if json:
        print_json(rows)
        return
    print_table(list(rows[0]), [list(row.values()) for row in rows])


@data.command(name="verify")
def verify(version: Version, *, json: Json = False) -> None:
    """Read every shard of a version and compare its sha256. Exit code 6 names those that are damaged or missing."""
    from training.data.activity import distrust
    from training.data.versions import verify_version

    store = open_store()
    name, digest, manifest = _find(store, version)
    num_shards = sum(len(shards) for shards in manifest.splits.values())
    live, damages = LiveLine(), []
    for number, damage in enumerate(verify_version(store, name, digest), start=1):
        if damage is not None:
            damages.append(damage)
        if not json:
            live.show(f"{number}/{num_shards} shards read")
        if damage is not None and not json:
            live.end(f"{damage.reason}: {store.location.uri(damage.key)}")
    live.end("" if json else f"{num_shards}/{num_shards} shards read")
    if json:
        print_json({"name": name, "digest": digest, "num_shards": num_shards, "damages": [asdict(d) for d in damages]})
    if damages:
        distrust(store, name)
        raise DamagedError(
            f"{len(damages)} of {num_shards} shards of {name} {digest[:12]} are damaged or missing. The next `unbroken"
            " run` from the same source repairs what it needs; `unbroken data import` of an export repairs all. A"
            " version that holds records withdrawn since is not made again: train on the new one"
        )
    if not json:
        print(f"{name} {digest}: all {num_shards} shards are whole")


@data.command(name="verify-run")
def verify_run(
    key: Annotated[str, Parameter(help="A run key, or the beginning of one.")], *, json: Json = False
) -> None:
    """Prove that a run read each sample of each epoch exactly once, in the declared order, over all its attempts."""
    from training.data import audit

    run = open_run(key)
    proof = audit.verify_run(run.store, run.run_key)
    if json:
        print_json(asdict(proof))
        return
    for name, value in asdict(proof).items():
        print(f"{name:18} {value}")


@data.command(name="withdraw")
def withdraw(
    version: Version,
    ids: Annotated[
        list[str] | None,
        Parameter(help="Ids of records: the file's name, or `FILE:LINE`, `FILE:ROW`, `ARCHIVE:NAME`.", negative=""),
    ] = None,
    *,
    file: Annotated[Path | None, Parameter(help="A file with one id per line.")] = None,
    reason: Annotated[str, Parameter(help="Why; it is kept beside the ids.")] = "",
    json: Json = False,
) -> None:
    """Make a version without some records, and have later ones leave them out too. Says which models used them."""
    from tasks.registry import versions_trained_on
    from tasks.stack import open_stack
    from training.data.withdraw import withdraw as take_out

    wanted = [*(ids or ()), *(_lines_of(file) if file else ())]
    if not wanted:
        raise UserError("name at least one record id, or a --file of them")
    settings, store = open_stack()
    name, digest, _ = _find(store, version)
    done = take_out(store, name, digest, wanted, reason=reason)
    told = asdict(done)
    try:
        told["models_that_used_them"] = versions_trained_on(settings.mlflow_uri, done.versions_that_train_on_them)
    finally:  # what is done is told, although MLflow may be away
        _print_withdrawal(told, json=json)


def _lines_of(file: Path) -> list[str]:
    try:
        return [line.removesuffix("\r") for line in file.read_text().split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file}: {error}") from error


def _print_withdrawal(told: dict[str, Any], *, json: bool) -> None:
    if json:
        print_json(told)
        return
    for field, value in told.items():
        print(f"{field:27} {', '.join(value) or 'none' if isinstance(value, (list, tuple)) else value}")


@data.command(name="rm")
def rm(version: Version, *, json: Json = False) -> None:
    """Remove a version that no run was trained on. `gc` then removes the shards that no other version has."""
    from training.data.versions import find_version, remove_version

    store = open_store()
    name, digest = find_version(store, version)
    remove_version(store, name, digest)
    _print_version(name, digest, f"removed {name} {digest}", json=json)


@data.command(name="gc")
def gc(
    name: Annotated[str, Parameter(help="The dataset's name.")],
    *,
    older_than: Annotated[float, Parameter(help="Hours that unfinished work is kept.")] = 24.0,
    dry_run: Annotated[bool, Parameter(negative="", help="Only say what would be deleted.")] = False,
    json: Json = False,
) -> None:
    """Delete shards and receipts that no version names, and kept results of versions and runs that are gone.

    Safe beside readers; refused while a writer is at work.
    """
    from training.data.collect import collect

    garbage = collect(open_store(), name, older_than_hours=older_than, dry_run=dry_run)
    if json:
        print_json(asdict(garbage))
        return
    verb = "would delete" if dry_run else "deleted"
    younger = f"; what is younger than {older_than:g} hours is kept" if older_than else ""
    print(f"{verb} {len(garbage.keys)} objects, {garbage.num_bytes:,} bytes{younger}")


@data.command(name="export")
def export(
    version: Version,
    *,
    to: Annotated[Path, Parameter(help="A new folder.")],
    format: Literal["webdataset", "parquet"],
    json: Json = False,
) -> None:
    """Write a version as WebDataset archives or Parquet files, one per shard, into a new folder."""
    from training.data import exchange

    store = open_store()
    name, digest, _ = _find(store, version)
    live = LiveLine()
    for path in exchange.export(store, name, digest, to, form=format):
        if not json:
            live.show(str(path))
    live.end()
    _print_version(name, digest, f"{name} {digest} is in {to}", json=json)


@data.command(name="import")
def import_(
    name: Annotated[str, Parameter(help="The dataset's name.")],
    folder: Annotated[Path, Parameter(help="What an export wrote, with its dataset.json.")],
    *,
    json: Json = False,
) -> None:
    """Make a version of what `export` wrote: the same one, to the last bit."""
    from training.config import require_name
    from training.data import exchange

    require_name("NAME", name)
    manifest = exchange.import_folder(open_store(), name, folder)
    _print_version(name, manifest.digest, f"{name} {manifest.digest}", json=json)


def _print_version(name: str, digest: str, line: str, *, json: bool) -> None:
    if json:
        print_json({"name": name, "digest": digest})
    else:
        print(line)


def _find(store: Store, text: str) -> tuple[str, str, Manifest]:
    from training.data.manifest import load_manifest
    from training.data.versions import find_version

    name, digest = find_version(store, text)
    return name, digest, load_manifest(store, name, digest)
