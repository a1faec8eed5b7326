"""The report: one HTML file without anything from elsewhere, and the same as JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import median
from string import Template

from tasks.drill.rows import Report, Row

TEMPLATE = Path(__file__).with_name("report.html")


def write_report(report: Report, folder: Path) -> list[Path]:
    """`report.html` and `report.json` in a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    page, document = folder / "report.html", folder / "report.json"
    page.write_text(html(report), encoding="utf-8")
    document.write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
    return [page, document]


def html(report: Report) -> str:
    """The page."""
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        preset=escape(report.preset),
        verdict="green" if report.is_green else "red",
        when=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(report.begun_at)),
        duration=_duration(report.seconds),
        conditions=escape(_conditions(report)),
        tiles="".join(
            f'<div class="tile"><b>{value}</b><span class="soft">{name}</span></div>' for name, value in _tiles(report)
        ),
        bars=_bars(report.rows),
        rows="\n".join(map(_row, report.rows)),
        facts="".join(f"<dt>{escape(name)}</dt><dd>{value}</dd>" for name, value in _facts(report).items()),
    )


def _duration(seconds: float) -> str:
    return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def _conditions(report: Report) -> str:
    ranks = report.num_nodes * report.processes_per_node
    return (
        f"{report.num_nodes} nodes with {ranks} ranks on {report.num_cores} cores of this machine; runs of"
        f" {report.num_steps:,} steps of {report.batch_size:,} samples, some {report.step_seconds * 1000:,.0f} ms each;"
        f" a checkpoint every {report.checkpoint_every_steps} steps"
    )


def _tiles(report: Report) -> Sequence[tuple[str, str]]:
    waits = [row.next_step_seconds for row in report.rows if row.next_step_seconds is not None]
    num_green = sum(row.status == "green" for row in report.rows)
    return (
        ("faults survived as promised", f"{num_green} of {len(report.rows)}"),
        ("with the undisturbed run's bits", f"{sum(row.bits_equal for row in report.rows)} of {len(report.rows)}"),
        ("median to the next step", f"{median(waits):.2f} s" if waits else "–"),
        ("samples read twice", f"{sum(row.samples_duplicated for row in report.rows):,}"),
    )


def _bars(rows: Sequence[Row]) -> str:
    """One per fault, on one scale."""
    longest = max((row.next_step_seconds or 0.0 for row in rows), default=0.0) or 1.0
    return "".join(_bar(row, longest) for row in rows)


def _bar(row: Row, longest: float) -> str:
    total = row.next_step_seconds or 0.0
    detect = min(row.detect_seconds or 0.0, total)
    widths = {"detect": detect, "rest": total - detect}
    parts = "".join(
        f'<i class="{name}" style="width:{100 * seconds / longest:.2f}%"></i>' for name, seconds in widths.items()
    )
    shown = _seconds(row.next_step_seconds)
    return f'<span>{row.fault}</span><div class="track">{parts}</div><span class="number">{shown} s</span>'


def _seconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds:.2f}"


def _row(row: Row) -> str:
    notes = [f"<small>{escape(row.evidence or row.otherwise)}</small>"]
    notes += [f'<small class="bad">{escape(complaint)}</small>' for complaint in row.complaints]
    redone = f"{row.steps_redone}{' or more' if row.is_redone_at_least else ''}"
    cells = (
        f"<td><b>{row.fault}</b><small>{escape(row.title)}</small>{''.join(notes)}</td>",
        f'<td><span class="pill {row.status.replace(" ", "-")}">{row.status}</span></td>',
        *(_number(_seconds(s)) for s in (row.detect_seconds, row.next_step_seconds, row.pause_seconds)),
        _number(redone),
        _number(f"{row.samples_duplicated:,}"),
        f"<td>{'equal' if row.bits_equal else '<b>other</b>'}</td>",
    )
    return f"<tr>{''.join(cells)}</tr>"


def _number(text: str) -> str:
    return f'<td class="number">{text}</td>'


def _facts(report: Report) -> Mapping[str, str]:
    calm = report.calm
    hang = f"called silent after {report.silence_seconds:g} s, hung after {report.hang_seconds:g} s"
    if report.preset_hang_seconds > report.hang_seconds:
        hang += f"; the preset waits {report.preset_hang_seconds:g} s for a hung rank"
    wrong = {"undisturbed run": "<br>".join(map(escape, calm.complaints))} if calm.complaints else {}
    return {
        **wrong,
        "undisturbed state": f"<code>{calm.state_sha256}</code>",
        "undisturbed weights": f"<code>{calm.weights_sha256}</code>",
        "samples": f"{calm.num_samples_read:,} read, {calm.num_whole_epochs} whole epochs, each sample once in each",
        "nodes": hang,
        "recipe and configuration": f"<code>{report.subject}</code>",
        "source of the library": f"<code>{report.code}</code>",
        "commit": f"<code>{escape(report.commit)}</code>",
        "environment": escape(", ".join(f"{name} {value}" for name, value in report.environment.items())),
        "drill": f"<code>{report.id}</code>",
    }
