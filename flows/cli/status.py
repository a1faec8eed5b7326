"""`status`: which services run, what the runs do; and one run, live on a terminal."""

from __future__ import annotations

import shutil
import sys
import time
import urllib.error
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from flows.cli.output import print_json
from flows.cli.stack import Json, open_run
from infra.fetching import fetch
from training.documents import read_document
from training.errors import DamagedError, InfrastructureError

if TYPE_CHECKING:
    from flows.monitor.terminal import Line
    from flows.monitor.view import Overview, RunView
    from infra.local.watch import ServiceStatus

LOOK_SECONDS = 2.0
MAX_WORDS = 1 << 16
"""Bytes of a refusal that are read."""
ANSWER_SECONDS = 60.0
"""A run that nobody watches is read when it is asked for."""
Run = Annotated[
    str, Parameter(help="A run key, or the beginning of one: this run alone, live on a terminal.", show_default=False)
]


def add_to(app: App) -> None:
    app.command(status)


def status(run: Run = "", /, *, json: Json = False) -> None:
    """Say which services run and what the runs do, or show one run. Exit code 3 if a service is not well."""
    from infra.local import stack

    if run:
        _show_run(run, as_json=json)
        return
    found = stack.status()
    if json:
        print_json(stack.status_json())
    else:
        _print_all(found)
    ill = [service.name for service in found if not service.healthy]
    if ill:
        raise InfrastructureError(
            f"not well: {', '.join(ill)}. What has died is started again by itself, within a minute or so; what stays"
            " away tells why in its log; what is stopped is started by `unbroken up` (or `make up`)"
        )


def _print_all(services: Sequence[ServiceStatus]) -> None:
    from flows.monitor.terminal import overview_lines, service_lines

    width = _width()
    _print(service_lines(services, width))
    for service in services:
        if service.name == "monitor" and service.healthy:
            overview = _overview(service.url)
            print()
            _print(overview_lines(overview, time.time(), width))


def _show_run(beginning: str, *, as_json: bool) -> None:
    from flows.monitor.terminal import run_lines, trouble_lines
    from infra.local import stack

    key = open_run(beginning).run_key
    url = stack.monitor_url()
    if as_json:
        print_json(_ask(f"{url}/runs/{key}.json"))
        return
    view, screen = _run(url, key), Screen()
    screen.show(run_lines(view, time.time(), _width()))
    while screen.is_terminal and not view.is_over:
        time.sleep(LOOK_SECONDS)
        trouble = ""
        try:
            view = _run(url, key)
        except InfrastructureError as error:  # it is started again by itself
            trouble = str(error)
        width = _width()
        screen.show([*trouble_lines(trouble, width), *run_lines(view, time.time(), width)])


class Screen:
    """Lines that replace those before them on a terminal; elsewhere they are printed."""

    def __init__(self) -> None:
        self.is_terminal = sys.stdout.isatty()
        self._num_lines = 0

    def show(self, lines: Sequence[Line]) -> None:
        if self.is_terminal:
            lines = lines[: shutil.get_terminal_size().lines - 1]  # what has left the screen cannot be replaced
            if self._num_lines:
                sys.stdout.write(f"\x1b[{self._num_lines}F\x1b[J")
            self._num_lines = len(lines)
        _print(lines)


def _print(lines: Sequence[Line]) -> None:
    is_terminal = sys.stdout.isatty()
    print("\n".join(line.painted() if is_terminal else line.text for line in lines), flush=True)


def _width() -> int:
    return max(40, shutil.get_terminal_size().columns)


def _run(url: str, key: str) -> RunView:
    from flows.monitor.view import RunView
    from training.documents import parse

    return parse(RunView, _ask(f"{url}/runs/{key}.json"))


def _overview(url: str) -> Overview:
    from flows.monitor.view import Overview
    from training.documents import parse

    return parse(Overview, _ask(f"{url}/overview.json"))


def _ask(url: str) -> Any:
    """Raises `InfrastructureError` with what the monitor says, or if it does not answer."""
    try:
        return read_document(fetch(url, timeout=ANSWER_SECONDS), what="what the monitor answers")
    except urllib.error.HTTPError as error:
        said = error.read(MAX_WORDS).decode(errors="replace")
        with suppress(DamagedError, KeyError):  # else they are another program's words
            said = str(read_document(said, what="what the monitor answers")["error"])
        raise InfrastructureError(said) from error
    except OSError as error:
        raise InfrastructureError(
            f"the monitor does not answer at {url} ({error}): see `unbroken status`; `unbroken runs show` asks the"
            " store itself"
        ) from error
