"""`drill`: the fault matrix on a preset of one's own, on this machine, with a report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from flows.cli.output import LiveLine, print_json, print_table
from flows.cli.run import Set, check_input, overrides_of
from flows.cli.stack import Json
from training.errors import RedDrillError
from training.preset_file import load_preset

if TYPE_CHECKING:
    from tasks.drill.rows import Report, Row


def add_to(app: App) -> None:
    app.command(drill)


def drill(
    preset: str,
    *,
    faults: Annotated[str, Parameter(help="Only these, as in worker-killed,all-killed (docs/drill.md).")] = "",
    steps: Annotated[int | None, Parameter(help="Of each run; else as many as take some ten seconds.")] = None,
    set_: Set = None,
    to: Annotated[Path | None, Parameter(help="A folder for report.html and report.json.")] = None,
    attach: Annotated[str | None, Parameter(help="A model version, NAME/VERSION or NAME@ALIAS.")] = None,
    json: Json = False,
) -> None:
    """Train PRESET for a moment with each fault in turn, and compare it bit by bit with a run that had none.

    Exit code 0 if all is green, 8 if a fault is red or did not fire. Nothing of it stays but the report.
    """
    config = load_preset(preset, overrides_of(set_))
    check_input(config)
    from tasks.drill import matrix
    from tasks.drill.attach import attach_to, require_subject
    from tasks.drill.report import write_report
    from tasks.shard import shard as shard_stage
    from tasks.stack import open_stack

    asked = matrix.plan(config, faults=[name for name in faults.split(",") if name], steps=steps)
    settings, store = open_stack()
    maybe_version = require_subject(settings, store, config, attach) if attach else None
    live = LiveLine()
    say = (lambda line: None) if json else live.show

    def done(row: Row) -> None:
        if not json:
            live.end(_line(row))

    say("sharding")
    dataset = shard_stage.fn(config)
    report = matrix.run(settings, store, asked, dataset_digest=dataset.digest, tell=say, done=done)
    folder = to or settings.home / "drills" / f"{report.preset}-{report.id}"
    paths = write_report(report, folder)
    if maybe_version is not None:
        attach_to(settings, maybe_version, report, paths)
    if json:
        print_json(report.to_json())
    else:
        live.end()
        _print(report, folder)
    if not report.is_green:
        bad = [f"{row.fault} ({row.status})" for row in report.rows if row.status != "green"]
        bad += [f"undisturbed ({complaint})" for complaint in report.calm.complaints]
        raise RedDrillError(f"the drill is not green: {', '.join(bad)}: see {folder / 'report.html'}")


def _line(row: Row) -> str:
    went_on = "-" if row.next_step_seconds is None else f"{row.next_step_seconds:.2f} s"
    told = "; ".join(row.complaints) or row.evidence or row.otherwise
    return f"{row.fault:20} {row.status:10} next step {went_on:>8}  {told}"


def _print(report: Report, folder: Path) -> None:
    print_table(
        ["fault", "", "detected s", "next step s", "pause s", "redone", "duplicated", "bits"],
        [
            [
                row.fault,
                row.status,
                *("-" if s is None else f"{s:.2f}" for s in (row.detect_seconds, row.next_step_seconds)),
                f"{row.pause_seconds:.2f}",
                f"{row.steps_redone}{' or more' if row.is_redone_at_least else ''}",
                row.samples_duplicated,
                "equal" if row.bits_equal else "OTHER",
            ]
            for row in report.rows
        ],
    )
    print(f"{report.num_steps} steps of {report.step_seconds * 1000:.0f} ms; the drill took {report.seconds:.0f} s")
    print(f"report         {folder / 'report.html'}")
