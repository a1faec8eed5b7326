"""What a drill found: one row per fault, and the whole, as a document that can be attached to a model version."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from training.documents import digest_of

FORMAT = 1
Status = Literal["green", "red", "not fired"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One fault, in a run of its own."""

    fault: str
    title: str
    evidence: str
    """What was seen to suffer from it; empty if nothing was."""
    otherwise: str
    """What it means if nothing was."""
    complaints: tuple[str, ...]
    """What was not as promised."""
    bits_equal: bool
    """The state's sha256, and each step's loss, gradient norm and samples, are those of the undisturbed run."""
    detect_seconds: float | None
    """From the fault until the run reacted to it, as seen in its record every twentieth of a second."""
    next_step_seconds: float | None
    """From the fault to the first step that was finished by those who went on."""
    pause_seconds: float
    """The longest time without a finished step, from the fault on."""
    steps_redone: int
    is_redone_at_least: bool
    """Nobody was left who knew of the last second's steps."""
    samples_duplicated: int
    num_groups: int
    """Of ranks, one after another, in the whole run."""
    run_seconds: float

    @property
    def status(self) -> Status:
        if self.complaints:
            return "red"
        return "green" if self.evidence else "not fired"


@dataclass(frozen=True, kw_only=True)
class Calm:
    """The run that nothing happened to."""

    state_sha256: str
    weights_sha256: str
    num_samples_read: int
    num_whole_epochs: int
    run_seconds: float
    complaints: tuple[str, ...]
    """What was not as promised, although nothing happened."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """The whole drill."""

    id: str
    begun_at: float
    seconds: float
    preset: str
    subject: str
    """Digest of the recipe and of what of its configuration decides bits: `tasks.drill.subject`."""
    code: str
    """Digest of the `training` package that ran."""
    commit: str
    environment: Mapping[str, str]
    num_nodes: int
    processes_per_node: int
    num_cores: int
    num_steps: int
    batch_size: int
    checkpoint_every_steps: int
    step_seconds: float
    silence_seconds: float
    hang_seconds: float
    preset_hang_seconds: float
    calm: Calm
    rows: tuple[Row, ...]
    format: int = FORMAT

    @property
    def is_green(self) -> bool:
        return bool(self.rows) and not self.calm.complaints and all(row.status == "green" for row in self.rows)

    @property
    def sha256(self) -> str:
        """Of the document."""
        return digest_of(self.to_json())

    def to_json(self) -> dict[str, Any]:
        rows = [{**vars(row), "complaints": list(row.complaints), "status": row.status} for row in self.rows]
        calm = {**vars(self.calm), "complaints": list(self.calm.complaints)}
        return {**vars(self), "calm": calm, "rows": rows, "verdict": "green" if self.is_green else "red"}
