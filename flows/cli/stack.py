"""`up`, `down`, `status`, `doctor`: the machine and the servers."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Parameter

from flows.cli.output import print_json, print_table
from training.errors import InfrastructureError

if TYPE_CHECKING:
    from training.s3.objectstore import Store

Json = Annotated[bool, Parameter(name="--json", negative="", help="Print JSON, for scripts.")]


def add_to(app: App) -> None:
    for verb in (up, down, status, doctor):
        app.command(verb)


def up(*, json: Json = False) -> None:
    """Start the local stack, or see that it is well."""
    from infra.local import stack

    settings = stack.up(lambda line: print(line, file=sys.stderr, flush=True))
    if json:
        print_json(stack.status_json())
        return
    print(f"Prefect  {settings.prefect_ui_url}")
    print(f"MLflow   {settings.mlflow_uri}/#/experiments?workflowType=machine_learning")
    print(f"S3       {settings.s3_endpoint or 'AWS'}  bucket {settings.s3_bucket}")
    print(f"For your own shell: source {settings.home / 'env'}")


def down() -> None:
    """Stop the local stack and every rank. The data stays."""
    from infra.local import stack

    print("stopped" if stack.down() else "nothing was running")


def status(*, json: Json = False) -> None:
    """Say which services run. Exit code 3 if one is not well."""
    from infra.local import stack

    found = stack.status()
    if json:
        print_json(stack.status_json())
    else:
        print_table(
            ["service", "state", "healthy", "url", "log"],
            [[s.name, s.state, "yes" if s.healthy else "no", s.url, s.log] for s in found],
        )
        _print_runs([service.url for service in found if service.name == "monitor" and service.healthy])
    ill = [service.name for service in found if not service.healthy]
    if ill:
        raise InfrastructureError(
            f"not well: {', '.join(ill)}. What has died is started again by itself, within a minute or so; what stays"
            " away tells why in its log; what is stopped is started by `unbroken up` (or `make up`)"
        )


def _print_runs(monitors: list[str]) -> None:
    """Those of which the monitor knows."""
    from flows.monitor.reading import COLUMNS, fetch, rows

    if found := [row for url in monitors for row in rows(fetch(url))]:
        print()
        print_table(list(COLUMNS), found)


def doctor(what: Literal["machine", "slurm"] = "machine", /, *, json: Json = False) -> None:
    """Check the machine, the stack and the stores; or `slurm`, the site's. Exit code 3 if something is wrong."""
    if what == "slurm":
        from flows.cli.doctor_slurm import run_checks
    else:
        from flows.cli.doctor import run_checks

    checks = run_checks()
    if json:
        print_json([vars(check) for check in checks])
    else:
        print_table(["check", "", "found"], [[c.name, "ok" if c.is_good else "WRONG", c.found] for c in checks])
    if not all(check.is_good for check in checks):
        raise InfrastructureError("something is wrong: see above")


def open_store() -> Store:
    """The stack's object store. Raises `InfrastructureError` if no stack is running and none is named, or if the store
    is silent.
    """
    from tasks.stack import open_stack

    _, store = open_stack()
    store.require_answer()
    return store
