"""How the command line shows things: tables, JSON, and one live line."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

PLAIN_LINE_SECONDS = 5.0


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Columns as wide as their widest cell."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(columns), *cells]) for i in range(len(columns))]
    for row in [list(columns), *cells]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


class LiveLine:
    """A line that is rewritten in place on a terminal; elsewhere a plain line now and then."""

    def __init__(self) -> None:
        self._is_terminal = sys.stdout.isatty()
        self._shown = ""
        self._next = 0.0

    def show(self, text: str) -> None:
        if self._is_terminal:
            sys.stdout.write(f"\r\x1b[2K{text}")
            sys.stdout.flush()
            self._shown = text
        elif text != self._shown and time.monotonic() >= self._next:
            print(text, flush=True)
            self._shown, self._next = text, time.monotonic() + PLAIN_LINE_SECONDS

    def end(self, text: str = "") -> None:
        """Print a lasting line where the live one was."""
        if self._is_terminal and self._shown:
            sys.stdout.write("\r\x1b[2K")
        if text:
            print(text, flush=True)
        self._shown = ""
