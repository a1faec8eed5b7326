"""`python -m benchmarks.scale`: the model's tables for 1 to 16,384 nodes, and its figure beside the measured points."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.scale.figure import draw
from benchmarks.scale.report import as_markdown

POINTS = Path(__file__).with_name("points.json")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--points", type=Path, default=POINTS, help="what benchmarks.scale.measure wrote")
    parser.add_argument("--figure", type=Path, help="write the figure here (SVG)")
    options = parser.parse_args(arguments)
    points = json.loads(options.points.read_text())
    if options.figure:
        draw(points, options.figure)
    print(as_markdown(points))


if __name__ == "__main__":
    main()
