"""The command line: `unbroken VERB` (docs/cli.md). Heavy modules are imported only where they are used."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from cyclopts import App

from flows.cli import (
    browse,
    checkpoints,
    data,
    drill,
    interchange,
    kubernetes,
    lifecycle,
    lineage,
    plan,
    report,
    run,
    scaffold,
    serve,
    stack,
    status,
)
from training.errors import UnbrokenError

app = App(
    name="unbroken",
    help="From raw data in a bucket to a registered model, with the same bits whatever dies on the way.",
    version_flags=["--version"],
    help_on_error=False,
)
stack.add_to(app)
status.add_to(app)
scaffold.add_to(app)
run.add_to(app)
drill.add_to(app)
data.add_to(app)
browse.add_to(app)
lifecycle.add_to(browse.models)
interchange.add_to(browse.models)
lineage.add_to(browse.models)
checkpoints.add_to(app)
serve.add_to(app)
report.add_to(app)
plan.add_to(app)
kubernetes.add_to(app)


def main(arguments: Sequence[str] | None = None) -> None:
    """Exit codes: docs/cli.md has the table; each error says its own."""
    try:
        app(arguments)
        sys.stdout.flush()
    except UnbrokenError as error:
        print(f"unbroken: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever read along has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


if __name__ == "__main__":
    main()
