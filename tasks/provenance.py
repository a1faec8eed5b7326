"""Where code came from, and who had a run started on it."""

from __future__ import annotations

import getpass
import os
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from training.config import Preset
from training.documents import canonical_json, digest_of, parse, read_document, sha256_hex
from training.errors import DamagedError
from training.s3.objectstore import Store


@dataclass(frozen=True, kw_only=True)
class Reproduced:
    """The stage of a DVC pipeline that started a run."""

    stage: str
    revision: str
    """The git commit of the DVC project, `+changes` if files differ from it; "none" outside of git."""
    experiment: str | None = None


@dataclass(frozen=True, kw_only=True)
class Start:
    """One start of a run that was not finished. No time is in it: the same starter again is the same object."""

    generation: int
    by: str
    """User and machine."""
    commit: str
    """As `commit_of` says."""
    changes_sha256: str | None = None
    """Of what differs from the commit, as `git diff HEAD` says it; new files are not in it."""
    flow_run: str | None = None
    """Prefect's id of it."""
    dvc: Reproduced | None = None


def commit_of(preset: Preset) -> str:
    """The git commit of the recipe's folder, with `+changes` if files there differ from it; "none" outside of git."""
    return _revision(preset.folder)


def start_of(preset: Preset, *, generation: int, flow_run: str | None, environment: Mapping[str, str]) -> Start:
    """What is known of a start in this process, whose `environment` tells whether DVC made it."""
    changes = _git(preset.folder, "diff", "HEAD", "--", ".")
    stage, root = environment.get("DVC_STAGE"), environment.get("DVC_ROOT")
    return Start(
        generation=generation,
        by=f"{getpass.getuser()}@{socket.gethostname()}",
        commit=commit_of(preset),
        changes_sha256=sha256_hex(changes.encode()) if changes else None,
        flow_run=flow_run,
        dvc=Reproduced(stage=stage, revision=_revision(root), experiment=environment.get("DVC_EXP_NAME"))
        if stage and root
        else None,
    )


def keep_start(store: Store, run_key: str, preset: Preset, *, generation: int, flow_run: str | None) -> None:
    """Note who starts a run, and on which code, for its lineage."""
    start = start_of(preset, generation=generation, flow_run=flow_run, environment=os.environ)
    document = asdict(start)
    store.put_immutable(f"{_folder(run_key)}{digest_of(document)}.json", canonical_json(document))


def starts_of(store: Store, run_key: str) -> list[Start]:
    """All that were noted. Raises `DamagedError` for one that is not what its name says."""
    found = []
    for key, _ in store.list_keys(_folder(run_key)):
        data = store.get_proven(key, sha256=key.rpartition("/")[2].removesuffix(".json"))
        try:
            found.append(parse(Start, read_document(data, what="it")))
        except DamagedError as error:
            raise DamagedError(f"{store.location.uri(key)}: {error}") from error
    return found


def _folder(run_key: str) -> str:
    return f"runs/{run_key}/starts/"


def _revision(folder: str) -> str:
    commit = _git(folder, "rev-parse", "HEAD")
    return (commit + ("+changes" if _git(folder, "status", "--porcelain", ".") else "")) if commit else "none"


def _git(folder: str, *arguments: str) -> str:
    done = subprocess.run(  # nosec B607 # the PATH's git is the user's own
        ["git", "-C", folder, *arguments], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else ""
