"""The run record: the one linearisation point of a run. It changes only by compare-and-set.

Everything else of a run is immutable and counts only when the record names it (docs/protocols.md).
"""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from training.config import Preset
from training.documents import digest_of, parse
from training.environment import NUMERICS_VERSION
from training.errors import DamagedError, FencedError, InfrastructureError, MissingError
from training.recipe import Recipe
from training.s3.objectstore import Store
from training.sources import source_closure_digest

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Member:
    """One node of the group that trains. A restarted agent is another incarnation of its node."""

    node: int
    incarnation: str
    address: str
    port: int


@dataclass(frozen=True, kw_only=True)
class CheckpointRef:
    """A proven checkpoint: every part was read back and matched before this was written."""

    step: int
    token: int
    sha256: str
    """Digest of its manifest."""
    signature: str | None = None
    """Of all this and of where it lies (training.checkpoints.trust)."""


@dataclass(frozen=True, kw_only=True)
class Quarantined:
    """A checkpoint found damaged, and why. It is never tried again."""

    checkpoint: CheckpointRef
    reason: str


@dataclass(frozen=True, kw_only=True)
class Departure:
    """Why a node left the group of `token`."""

    token: int
    node: int
    cause: str
    step: int
    class_name: str
    """Says which class of failure it is (training.runs.failures)."""
    records: tuple[str, ...] = ()
    """Those that cause it, each by itself."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a run stopped for good, by the name of the error class that says who must act."""

    kind: str
    message: str
    records: tuple[str, ...] = ()
    """Those that cause it, each by itself."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a finished run gave. A function of the run key alone, unless it is `inexact`."""

    step: int
    weights_sha256: str
    state_sha256: str
    checkpoint: CheckpointRef
    inexact: str | None = None
    """The setting by which another run of this key gives another result."""
    signature: str | None = None
    """Of all this, and of whose result it is (training.checkpoints.trust)."""


@dataclass(frozen=True, kw_only=True)
class InitialWeights:
    """What a run begins with, if not with new weights: the result of another run."""

    run_key: str
    generation: int
    checkpoint: CheckpointRef
    weights_sha256: str


@dataclass(frozen=True, kw_only=True)
class Continued:
    """The run whose first steps this one took over, instead of doing them again."""

    run_key: str
    generation: int
    step: int


@dataclass(frozen=True, kw_only=True)
class Record:
    """The state of a run that all its processes agree on."""

    key: str
    instance: str = ""
    """Tells this record from one of the same key that was removed before."""
    secret: str = ""
    """Known to whoever may read the record: agents prove to one another that they do."""
    generation: int = 0
    fresh_mark: str | None = None
    """Who asked for this generation, so that asking twice (a retry) begins anew only once."""
    token: int = 0
    """The fencing token: grows by one whenever the set of nodes changes. Writers with an older one are refused."""
    members: tuple[Member, ...] = ()
    num_nodes: int = 0
    signs_of_life: int = 0
    """Grows while the group trains, also between checkpoints."""
    resume_steps: tuple[int | None, ...] = ()
    """For each token from 1: the step it resumed from (None: it never began). Events count up to a later one's."""
    checkpoints: tuple[CheckpointRef, ...] = ()
    quarantined: tuple[Quarantined, ...] = ()
    departures: tuple[Departure, ...] = ()
    forgiven_token: int = 0
    """Departures up to this token count no more: somebody started the run again after it had failed."""
    environment: dict[str, str] = field(default_factory=dict)
    tracking_run_id: str | None = None
    continued: Continued | None = None
    result: Result | None = None
    failure: Failure | None = None

    @property
    def attempt_starts(self) -> tuple[int, ...]:
        """The step that each attempt began from, in order."""
        return tuple(step for step in self.resume_steps if step is not None)

    def require_token(self, token: int) -> None:
        """Raises `FencedError` if another token owns the run."""
        if self.token != token:
            raise FencedError(f"token {token} was replaced by {self.token}: this process writes nothing more")


def run_key(*, recipe: Recipe, preset: Preset, dataset_digest: str, initial_weights: str | None = None) -> str:
    """sha256 over the canonical JSON of all that determines the result."""
    return digest_of(determining(recipe, preset, dataset_digest, initial_weights))


def trajectory_key(*, recipe: Recipe, preset: Preset, dataset_digest: str, initial_weights: str | None = None) -> str:
    """What all runs share that differ in their number of steps alone (training.checkpoints.continuation)."""
    return trajectory_of(determining(recipe, preset, dataset_digest, initial_weights))


def trajectory_of(document: dict[str, Any]) -> str:
    """The same of what determines a run's result."""
    preset = document["preset"]
    train = {name: value for name, value in preset["train"].items() if name != "steps"}
    return digest_of({**document, "preset": {**preset, "train": train}})


def determining(recipe: Recipe, preset: Preset, dataset_digest: str, initial_weights: str | None) -> dict[str, Any]:
    """All that determines the result, as a document: its digest is the run key."""
    return {
        "recipe": preset.recipe,
        "recipe_source": source_closure_digest(recipe),
        "numerics_version": NUMERICS_VERSION,
        "preset": {**preset.determining(), "hyperparameters": asdict(recipe)},
        "dataset": dataset_digest,
        "initial_weights": initial_weights,
    }


def generation_prefix(key: str, generation: int) -> str:
    """Where the objects of one generation of a run lie."""
    return f"runs/{key}/{generation}/"


class RunRecord:
    """The record of one run on the object store."""

    def __init__(self, store: Store, key: str) -> None:
        self.store = store
        self.run_key = key
        self.object_key = f"runs/{key}/record.json"

    def prefix(self, record: Record) -> str:
        """Where the objects of this generation lie."""
        return generation_prefix(self.run_key, record.generation)

    def create_if_missing(self) -> Record:
        """The record, made if this is the first to ask."""
        self.store.create_versioned(self.object_key, _to_json(_new_record(self.run_key)))
        return self.read()

    def read(self) -> Record:
        """Raises `MissingError` if there is none, `DamagedError` naming it if it is no record."""
        return self._parsed(self.store.read_versioned(self.object_key).document)

    def find(self) -> Record | None:
        try:
            return self.read()
        except MissingError:
            return None

    def update(self, change: Callable[[Record], Record]) -> Record:
        """Replace the record by `change(record)`, tried again whenever another writer was first.

        `change` sees the newest record each time and may raise to refuse. An unchanged record is not written.
        """
        for attempt in range(200):
            read = self.store.read_versioned(self.object_key)
            before = self._parsed(read.document)
            after = change(before)
            if after == before or self.store.replace_versioned(self.object_key, _to_json(after), read=read):
                return after
            time.sleep(0.01 * min(attempt, 20))
        raise InfrastructureError(f"{self.object_key} could not be updated: too many writers")

    def _parsed(self, document: Mapping[str, Any]) -> Record:
        uri = self.store.location.uri(self.object_key)
        try:
            record = parse(Record, document)
        except DamagedError as error:
            raise DamagedError(f"{uri}: {error}") from error
        if document.get("format") != FORMAT or record.key != self.run_key:
            raise DamagedError(f"{uri} is of another run, or of another format than {FORMAT}, which this release reads")
        return record


def start_fresh(record: Record) -> Record:
    """A new generation: nothing of the old one counts, and its processes are fenced off."""
    return Record(
        key=record.key,
        instance=record.instance,
        secret=record.secret,
        generation=record.generation + 1,
        token=record.token + 1,
    )


def _new_record(key: str) -> Record:
    return Record(key=key, instance=uuid.uuid4().hex, secret=secrets.token_hex(32))


def without_failure(record: Record) -> Record:
    """To start again is to try again: the failure, and the restarts that led to it, count no more."""
    if record.failure is None:
        return record
    return replace(record, failure=None, forgiven_token=record.token)


def with_environment(record: Record, environment: dict[str, str], *, token: int) -> Record:
    """The first to train says in which environment; it stays."""
    record.require_token(token)
    return record if record.environment else replace(record, environment=environment)


def with_checkpoint(record: Record, checkpoint: CheckpointRef) -> Record:
    """Name a proven checkpoint under its token. Raises `FencedError` for any but the current token."""
    record.require_token(checkpoint.token)
    others = tuple(c for c in record.checkpoints if c.step != checkpoint.step)
    ordered = sorted((*others, checkpoint), key=lambda c: c.step)
    return replace(record, checkpoints=tuple(ordered))


def with_quarantined(record: Record, checkpoint: CheckpointRef, reason: str, *, token: int) -> Record:
    """Strike a damaged checkpoint from the proven ones, and keep the reason."""
    record.require_token(token)
    if checkpoint not in record.checkpoints:  # another rank found the same
        return record
    return replace(
        record,
        checkpoints=tuple(c for c in record.checkpoints if c != checkpoint),
        quarantined=(*record.quarantined, Quarantined(checkpoint=checkpoint, reason=reason)),
    )


def with_retention(record: Record, *, token: int, keep: int, keep_every_steps: int | None = None) -> Record:
    """Keep the newest `keep` checkpoints (at least one: the last proven one is never dropped), and those of every
    `keep_every_steps`-th step."""
    record.require_token(token)
    newest = record.checkpoints[-max(1, keep) :]
    kept = tuple(c for c in record.checkpoints if c in newest or (keep_every_steps and c.step % keep_every_steps == 0))
    return replace(record, checkpoints=kept)


def with_resume_step(record: Record, step: int, *, token: int) -> Record:
    """Note where `token` begins: what earlier tokens did beyond this step does not count."""
    record.require_token(token)
    padded = record.resume_steps + (None,) * (token - len(record.resume_steps))
    return replace(record, resume_steps=(*padded[: token - 1], step))


def with_continued(
    record: Record, continued: Continued, checkpoint: CheckpointRef, environment: dict[str, str]
) -> Record:
    """Begin where another run stands: its history counts as the first attempt, under the checkpoint's token."""
    record = with_checkpoint(with_resume_step(record, 0, token=checkpoint.token), checkpoint)
    return replace(record, continued=continued, environment=environment)


def with_result(record: Record, result: Result, *, token: int) -> Record:
    record.require_token(token)
    return replace(record, result=result, failure=None)


def _to_json(record: Record) -> dict[str, Any]:
    return {"format": FORMAT, **asdict(record, dict_factory=_without_what_few_have)}


def _without_what_few_have(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return dict(pair for pair in pairs if pair not in (("signature", None), ("inexact", None)))
