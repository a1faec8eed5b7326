"""`report`: one HTML file about a run, or about several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from flows.cli.output import print_json
from flows.cli.stack import Json, open_store
from training.errors import UserError


def add_to(app: App) -> None:
    app.command(report)


def report(
    run: Annotated[str, Parameter(help="A run key, or the beginning of one.")],
    /,
    *others: Annotated[str, Parameter(help="More of them: all are compared.")],
    output: Annotated[
        Path | None, Parameter(help="The file; else report-KEY.html here. An earlier report there is replaced.")
    ] = None,
    json: Json = False,
) -> None:
    """Write one HTML file about a run, finished or not: curves, failures, where the time went, evaluation, lineage."""
    from training.runs.finding import find_run

    store = open_store()
    found = {one.run_key: one for one in (find_run(store, beginning) for beginning in (run, *others))}
    path = output or Path(f"report-{'-'.join(key[:8] for key in found)}.html")
    from infra.local.files import write_whole
    from infra.settings import load_settings
    from tasks.report.compare import require_comparable
    from tasks.report.gather import gather
    from tasks.report.page import page_of, page_of_several
    from training.documents import sha256_hex

    require_comparable(list(found))
    _require_free(path)
    settings = load_settings()
    facts = [gather(settings, one) for one in found.values()]
    page = page_of(facts[0]) if len(facts) == 1 else page_of_several(facts)
    write_whole(path, page)
    if json:
        _print_json(path, page.encode(), list(found), sha256_hex(page.encode()))
        return
    print(path)
    for line in dict.fromkeys(line for one in facts for line in one.unknown):
        print(f"not in it: {line}")


def _print_json(path: Path, page: bytes, keys: Sequence[str], sha256: str) -> None:
    print_json({"file": str(path), "bytes": len(page), "sha256": sha256, "runs": keys})


def _require_free(path: Path) -> None:
    """Raises `UserError` for a place where no report can go, or where something else is."""
    from tasks.report.page import is_report

    if not path.name or not path.parent.is_dir():
        raise UserError(f"--output {str(path)!r}: name a file in a folder that is there")
    if path.exists() and not (path.is_file() and is_report(path)):
        raise UserError(f"{path} exists, and is no report: name another file with --output")
