"""`models why | verify | replay`: where a model came from, and the proof of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from itertools import count
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from cyclopts import App, Parameter

from flows.cli.output import LiveLine, print_json
from flows.cli.stack import Json, open_store
from training.errors import DamagedError

if TYPE_CHECKING:
    from infra.settings import Settings
    from tasks.lifecycle.model_file import KeptVersion
    from tasks.lineage.replay import Compared
    from tasks.lineage.verify import Checked
    from training.s3.objectstore import Store

T = TypeVar("T")
Version = Annotated[str, Parameter(help="MODEL (its champion), MODEL@champion, MODEL@VERSION or MODEL@ALIAS.")]


def add_to(models: App) -> None:
    for verb in (why, verify, replay):
        models.command(verb)


def why(
    model: Version,
    /,
    *,
    page: Annotated[bool, Parameter(negative="", help="Write it anew on the version's page in MLflow, too.")] = False,
    json: Json = False,
) -> None:
    """Where a version came from: data, order, code, preset, environment, attempts, checkpoints, gate and history."""
    from tasks.lineage.gather import lineage_of
    from tasks.lineage.page import show
    from tasks.lineage.tree import terminal_lines, tree_of

    settings, store, kept = _find(model)
    lineage = lineage_of(settings, store, kept)
    if json:
        print_json(asdict(lineage))
    else:
        print("\n".join(terminal_lines(tree_of(lineage))))
    if page and not show(settings, store, kept):
        print("the version's description in MLflow is a person's, and stays: the lineage is among the run's artifacts")


def verify(model: Version, /, *, json: Json = False) -> None:
    """Hash anew all that a version came from. Exit code 6 names the first thing that differs."""
    from tasks.lineage import verify as module

    settings, store, kept = _find(model)
    line, number = LiveLine(), count(1)

    def show(one: Checked) -> None:
        line.show(f"{next(number)} {'whole' if one.is_whole else 'not compared'}  {one.what}")

    checked, maybe_damage = _up_to_damage(module.verify(settings, store, kept), None if json else show)
    if json:
        _print_found(kept, maybe_damage, checked=[asdict(one) for one in checked])
    if maybe_damage is not None:
        line.end()
        raise maybe_damage
    if not json:
        open_points = [one for one in checked if not one.is_whole]
        line.end(f"{kept.model} version {kept.version}: {len(checked) - len(open_points)} things are what they were")
        for one in open_points:
            print(f"not compared: {one.what}: {one.note}")


def replay(
    model: Version,
    /,
    *,
    steps: Annotated[
        str | None, Parameter(help="A:B, both included; else those after the last checkpoint before the end.")
    ] = None,
    json: Json = False,
) -> None:
    """Train a window of steps once more, on one rank here, and compare each step. Exit code 6 names the first that
    differs."""
    from tasks.lineage import replay as module

    _, store, kept = _find(model)
    line = LiveLine()
    window, start, done = module.replay(store, kept, steps)

    def show(one: Compared) -> None:
        line.show(f"step {one.step}/{window.last} equal  {one.weights}")

    compared, maybe_damage = _up_to_damage(done, None if json else show)
    if json:
        steps_told = [asdict(one) for one in compared]
        _print_found(kept, maybe_damage, window=asdict(window), began_after_step=start, steps=steps_told)
    if maybe_damage is not None:
        line.end()
        raise maybe_damage
    if not json:
        asked = [one for one in compared if one.is_asked]
        digests = sum(one.has_digest for one in asked)
        line.end(
            f"{kept.model} version {kept.version}: steps {window.first} to {window.last} are equal, {digests} of"
            f" {len(asked)} by the digest of all weights, the others by loss, gradient norm and samples (from"
            f" {f'the checkpoint of step {start}' if start else 'the beginning'})"
        )


def _find(model: str) -> tuple[Settings, Store, KeptVersion]:
    from infra.settings import load_settings
    from tasks.lineage.named import find_kept

    store = open_store()
    settings = load_settings()
    return settings, store, find_kept(settings, store, model)


def _up_to_damage(found: Iterable[T], maybe_show: Callable[[T], None] | None) -> tuple[list[T], DamagedError | None]:
    """What was compared until something differed, each shown as it comes; and what differs."""
    taken: list[T] = []
    try:
        for one in found:
            taken.append(one)
            if maybe_show is not None:
                maybe_show(one)
    except DamagedError as error:
        return taken, error
    return taken, None


def _print_found(kept: KeptVersion, maybe_damage: DamagedError | None, **found: Any) -> None:
    about = {"model": kept.model, "version": kept.version, "run_key": kept.run_key}
    print_json({**about, **found, "differs": None if maybe_damage is None else str(maybe_damage)})
