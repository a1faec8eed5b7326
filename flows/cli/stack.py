"""`up`, `down`, `doctor`: the machine and the servers."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Parameter

from flows.cli.output import print_json, print_table
from training.errors import InfrastructureError, UserError

if TYPE_CHECKING:
    from training.runs.record import RunRecord
    from training.s3.objectstore import Store

Json = Annotated[bool, Parameter(name="--json", negative="", help="Print JSON, for scripts.")]


def add_to(app: App) -> None:
    for verb in (up, down, doctor):
        app.command(verb)


def up(*, json: Json = False) -> None:
    """Start the local stack, or see that it is well."""
    from infra.local import stack
    from infra.passwords import USER, password_path

    settings = stack.up(lambda line: print(line, file=sys.stderr, flush=True))
    if json:
        print_json(stack.status_json())
        return
    print(f"Status   {stack.monitor_url()}")
    print(f"Prefect  {settings.prefect_ui_url}")
    print(f"MLflow   {settings.mlflow_uri}/#/experiments?workflowType=machine_learning")
    print(f"S3       {settings.s3_endpoint or 'AWS'}  bucket {settings.s3_bucket}")
    for part in settings.passwords:
        print(f"{part} asks who you are: user {USER}, with the password in {password_path(settings.home, part)}")
    print(f"For your own shell: source {settings.home / 'env'}")


def down() -> None:
    """Stop the local stack and every rank. The data stays."""
    from infra.local import stack

    print("stopped" if stack.down() else "nothing was running")


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


def open_store_to_sign() -> Store:
    """The same. Raises `UserError` if there is no key to sign with."""
    from training import signatures

    store = open_store()
    if signatures.keyring() is None:
        raise UserError(f"no signing key is known: set {signatures.VARIABLE}, or [signing] key_file in unbroken.toml")
    return store


def open_run(beginning: str) -> RunRecord:
    """The run in the stack's store whose key begins so. Raises `UserError` if there is none, or several."""
    from training.runs.finding import find_run

    return find_run(open_store(), beginning)
