"""`models promote | rollback | history`: who is champion, and who was."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from flows.cli.output import print_json, print_table
from flows.cli.stack import Json, open_store, open_store_to_sign

if TYPE_CHECKING:
    from tasks.lifecycle.promotion import Outcome

Reason = Annotated[str, Parameter(help="Why, for the history.")]
Gate = Annotated[bool, Parameter(help="Without it nothing is judged; the history shows that no decision was.")]


def add_to(models: App) -> None:
    for verb in (promote, rollback, history, sign):
        models.command(verb)


def promote(
    version: str,
    /,
    *,
    reason: Reason = "",
    gate: Annotated[
        bool, Parameter(help="Without it nothing is judged; the history shows that no decision was.")
    ] = True,
    json: Json = False,
) -> None:
    """Make VERSION (NAME/VERSION or NAME@ALIAS) champion, once its bytes are proven and the gate lets it through.

    Exit code 9 if another became champion meanwhile, 10 if the gate refuses it; then nothing is changed.
    """
    from infra.settings import load_settings
    from tasks.gate.judge import judge
    from tasks.lifecycle import promotion
    from tasks.lineage import page

    settings, store = load_settings(), open_store()
    maybe_judge = judge if gate else None
    outcome = promotion.promote(settings, store, version, by=_user_and_machine(), reason=reason, judge=maybe_judge)
    page.renew(settings, store, outcome)
    _tell(outcome, json)


def rollback(
    model: str,
    /,
    *,
    to: Annotated[str | None, Parameter(help="An earlier champion's version, if not the one before.")] = None,
    reason: Reason = "",
    json: Json = False,
) -> None:
    """Make the champion before the current one champion again. Refused if its bytes are damaged (exit code 6)."""
    from infra.settings import load_settings
    from tasks.lifecycle import promotion
    from tasks.lineage import page

    settings, store = load_settings(), open_store()
    outcome = promotion.roll_back(settings, store, model, to=to, by=_user_and_machine(), reason=reason)
    page.renew(settings, store, outcome)
    _tell(outcome, json)


def history(
    model: str,
    /,
    *,
    at: Annotated[
        str | None, Parameter(help="Only who it was then: 2026-11-27T08:00, UTC if it names no zone.")
    ] = None,
    json: Json = False,
) -> None:
    """Who was champion of MODEL, since when, by whom and why; the newest last."""
    from tasks.lifecycle import champions
    from tasks.lifecycle.champion import moment

    time = moment(at) if at is not None else None
    champion = champions.read(open_store(), model)
    entries = champion.entries if time is None else (champion.at(time),)
    if json:
        print_json([{**asdict(entry), "when": entry.when} for entry in entries])
        return
    columns = ["change", "since", "action", "version", "run key", "by", "reason"]
    print_table(
        columns,
        [[e.sequence, e.when, e.action, e.version, e.run_key[:12], e.by, e.reason] for e in entries],
    )


def sign(model: str, /) -> None:
    """Sign all that the store says of MODEL with this machine's key, once its files are proven: you vouch for it."""
    from tasks.lifecycle import champions, model_file
    from training.errors import MissingError, UserError

    store = open_store_to_sign()
    versions = [key.rpartition("/")[2].removesuffix(".json") for key, _ in store.list_keys(f"models/{model}/versions/")]
    for version in sorted(versions):
        kept = model_file.sign_again(store, model, version)
        print(f"version {version}: model file sha256 {kept.model_sha256}, of run {kept.run_key[:12]}")
    try:
        entry = champions.sign_again(store, model).current
    except MissingError:
        if not versions:
            raise UserError(f"nothing is kept of a model {model!r}: see `unbroken models ls`") from None
    else:
        print(f"champion: version {entry.version}, model file sha256 {entry.model_sha256}")
    print("signed")


def _tell(outcome: Outcome, json: bool) -> None:
    entry = outcome.entry
    if json:
        print_json(asdict(outcome))
        return
    word = "is" if outcome.is_new else "was already"
    print(f"{outcome.model} version {entry.version} {word} champion (change {entry.sequence})")
    if not outcome.is_shown:
        print("MLflow is away: its alias follows once it is back")


def _user_and_machine() -> str:
    """Who gives this command: user and machine."""
    import getpass
    import socket

    return f"{getpass.getuser()}@{socket.gethostname()}"
