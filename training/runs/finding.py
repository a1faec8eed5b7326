"""Which runs a store has, and which of them the beginning of a key means."""

from __future__ import annotations

from training.errors import UserError
from training.runs.record import RunRecord
from training.s3.objectstore import Store


def all_runs(store: Store, beginning: str = "") -> list[RunRecord]:
    """Those of which something is left, be it that their record was removed."""
    return [RunRecord(store, key) for key in store.list_folders("runs/") if key.startswith(beginning)]


def find_run(store: Store, beginning: str) -> RunRecord:
    """The only one with a record, and with a key that begins so. Raises `UserError` if there is none, or several."""
    if not beginning:
        raise UserError("a run key must not be empty: see `unbroken runs ls`")
    matches = [run for run in all_runs(store, beginning) if run.find() is not None]
    if len(matches) != 1:
        some = "no run" if not matches else f"{len(matches)} runs"
        which = f" ({', '.join(run.run_key[:12] for run in matches[:8])})" if matches else ""
        raise UserError(f"{some} with a key that begins with {beginning!r}{which}: see `unbroken runs ls`")
    return matches[0]
