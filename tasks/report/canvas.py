"""What all figures share: sizes, fonts, and colours that the page's style names, so that they follow dark mode."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    "training": "#0072b2",
    "validation": "#009e73",
    "redone": "#d55e00",
    "recovery": "#e69f00",
    "waiting": "#8a94a0",
    "checkpoint": "#cc79a7",
    "nodes": "#56b4e9",
    "ink": "#1a2129",
    "soft": "#5d6875",
    "line": "#e2e6ea",
    "card": "#fefefe",
}
"""By what they stand for, in all figures of a run; a CSS variable `--NAME` of the page each. Okabe and Ito's, which the
colour-blind can tell apart."""
RUN_COLOURS = {
    f"run{number}": colour
    for number, colour in enumerate(
        ("#0072b3", "#e69f01", "#009e74", "#cc79a8", "#d55e01", "#56b4ea", "#7a6a00", "#5d6876")
    )
}
"""Of runs side by side; another value for each name, since names are found again by it."""
WIDTH_INCHES = 5.0
WIDE_INCHES = 9.0
MAX_NAME_CHARACTERS = 40

_STYLE: Any = {  # keys are literals to matplotlib
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans"],
    "font.size": 9.0,
    "text.parse_math": False,
    "path.simplify": True,
    "figure.dpi": 72.0,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": COLOURS["line"],
    "axes.labelcolor": COLOURS["soft"],
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": False,
    "grid.color": COLOURS["line"],
    "grid.linewidth": 0.7,
    "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["line"],
    "ytick.color": COLOURS["line"],
    "xtick.labelcolor": COLOURS["soft"],
    "ytick.labelcolor": COLOURS["soft"],
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "lines.linewidth": 1.4,
    "lines.solid_joinstyle": "round",
}
_BY_VALUE = {value: name for name, value in (COLOURS | RUN_COLOURS).items()}


@contextmanager
def style() -> Iterator[None]:
    """Figures are made under this, and so look the same whatever this user's matplotlib is set to."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the reader's browser has other fonts
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def canvas(*, rows: int, height: float, width: float = WIDTH_INCHES, **more: Any) -> tuple[Figure, Sequence[Axes]]:
    """Axes below one another, with one x axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, 1, squeeze=False, sharex=rows > 1, **more)
    return figure, list(axes[:, 0])


def svg(figure: Figure, name: str) -> str:
    """The figure as a part of a page: its ids begin with `name`, and nothing in it differs the next time."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": name}):
        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg ") :].strip()
    head, sign, body = text.partition(">")
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = body.replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'href="#{name}-')
    body = re.sub(r'\b(?:d|x|y)="[^"]*"', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]), body)
    body = re.sub(r"#[0-9a-f]{6}\b", lambda found: _variable(found[0]), body)
    return f'<svg {box[0]} role="img" aria-labelledby="{name}-title"{sign}{body}'


def _variable(colour: str) -> str:
    name = _BY_VALUE.get(colour)
    return colour if name is None else f"var(--{name})"


def short(text: str) -> str:
    """A name as a figure has room for."""
    return text if len(text) <= MAX_NAME_CHARACTERS else f"{text[: MAX_NAME_CHARACTERS - 1]}…"
