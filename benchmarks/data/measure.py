"""The measurement itself: rounds of cases, and in every round each contestant once per case, in a rotating order."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.data.contestants.protocol import Outcome, Task
from benchmarks.data.fleet import FLOOR, OURS, Runner
from benchmarks.data.records import KINDS, make_source
from benchmarks.data.store import drop_bucket, flip_byte, make_bucket

NUM_CHUNKS = 8
LIMIT_SECONDS = 180.0
DAMAGE_LIMIT_SECONDS = 60.0


@dataclass(frozen=True)
class Case:
    """What is measured, but for who does it."""

    kind: str
    action: str
    num_processes: int = 1
    shuffled: bool = False

    @property
    def title(self) -> str:
        if self.action == "write":
            return f"{self.kind}: write"
        order = "shuffled" if self.shuffled else "sequential"
        return f"{self.kind}: {order} read, {self.num_processes} process{'es' * (self.num_processes > 1)}"


def all_cases() -> list[Case]:
    reads = [(number, shuffled) for shuffled in (False, True) for number in (1, 2)]
    return [
        case for kind in KINDS for case in (Case(kind, "write"), *(Case(kind, "read", *choice) for choice in reads))
    ]


@dataclass(frozen=True)
class Data:
    """The raw records of one kind, and what a reader of all of them must find."""

    folder: Path
    num_samples: int
    num_bytes: int
    content: int

    @property
    def id_sum(self) -> int:
        return self.num_samples * (self.num_samples - 1) // 2

    def fault(self, outcome: Outcome, *, checked: bool) -> str:
        """Why an outcome does not count; empty if it does."""
        if outcome.error:
            return outcome.error
        if outcome.num_samples != self.num_samples or outcome.id_sum != self.id_sum:
            return f"gave {outcome.num_samples} samples (sum of ids {outcome.id_sum}), not all {self.num_samples} once"
        return "the samples' contents are wrong" if checked and outcome.content != self.content else ""


def make_data(folder: Path, num_bytes: Mapping[str, int]) -> dict[str, Data]:
    made = {}
    for name, kind in KINDS.items():
        num_files = kind.files(num_bytes[name])
        content = make_source(folder / name, kind, num_files)
        num_samples = num_files * kind.rows_per_file
        made[name] = Data(folder / name, num_samples, num_samples * kind.dtype.itemsize, content)
    return made


@dataclass
class Bench:
    """All outcomes, by case and contestant; who was disqualified, and why."""

    runners: Mapping[str, Runner]
    data: Mapping[str, Data]
    scratch: Path
    outcomes: dict[tuple[Case, str], list[Outcome]] = field(default_factory=dict)
    disqualified: dict[tuple[Case, str], str] = field(default_factory=dict)
    damage: dict[tuple[str, str], str] = field(default_factory=dict)

    def prepare(self) -> None:
        """Every contestant's data set of each kind, to be read in all rounds."""
        for kind in self.data:
            for name in self.runners:
                make_bucket(_bucket(kind, name))
                self._refuse_if(Case(kind, "write"), name, self._ask(name, self._task(Case(kind, "write"), name)).error)

    def run_round(self, number: int, cases: Sequence[Case]) -> None:
        """Round 0 warms up, and proves that all contents arrive."""
        for case in cases:
            for name in _rotated(list(self.runners), number):
                if (case, name) not in self.disqualified:
                    self._measure(case, name, number)

    def _measure(self, case: Case, name: str, number: int) -> None:
        if case.action == "write":
            outcome = self._write(case, name)
            fault = outcome.error
        else:
            outcome = self._ask(name, self._task(case, name, checked=number == 0))
            fault = self.data[case.kind].fault(outcome, checked=number == 0)
        print(f"round {number}  {case.title:42}{name:12}{fault or f'{outcome.seconds:8.3f} s'}", file=sys.stderr)
        self._refuse_if(case, name, fault)
        if number and not fault:
            self.outcomes.setdefault((case, name), []).append(outcome)

    def _refuse_if(self, case: Case, name: str, fault: str) -> None:
        if fault:
            self.disqualified[case, name] = fault

    def _write(self, case: Case, name: str) -> Outcome:
        bucket = f"fresh-{name}"
        make_bucket(bucket)
        outcome = self._ask(name, self._task(case, name, bucket=bucket))
        drop_bucket(bucket)
        return outcome

    def try_damage(self) -> None:
        """Flip a byte in every data set, and see whether its reader says so. Nothing can be measured after this."""
        for kind in self.data:
            for name in self.runners:
                if name == FLOOR.name:  # it reads ours
                    continue
                flip_byte(_bucket(kind, name), containing="/shards/" if name == OURS.name else "")
                task = self._task(Case(kind, "read"), name, checked=True)
                outcome = self._ask(name, task, limit_seconds=DAMAGE_LIMIT_SECONDS)
                self.damage[kind, name] = self._verdict(kind, outcome)

    def _verdict(self, kind: str, outcome: Outcome) -> str:
        kind_of_error, is_raised, _ = outcome.error.partition(":")
        if outcome.error:
            return f"yes: {kind_of_error}" if is_raised else outcome.error
        return "no: damaged data" if self.data[kind].fault(outcome, checked=True) else "no: whole data"

    def _ask(self, name: str, task: Task, *, limit_seconds: float = LIMIT_SECONDS) -> Outcome:
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir(parents=True)
        return self.runners[name].ask(task, limit_seconds=limit_seconds)

    def _task(self, case: Case, name: str, *, bucket: str = "", checked: bool = False) -> Task:
        reads_ours = name == FLOOR.name and case.action == "read"
        return Task(
            action=case.action,
            kind_name=case.kind,
            source=str(self.data[case.kind].folder),
            bucket=bucket or _bucket(case.kind, OURS.name if reads_ours else name),
            scratch=str(self.scratch),
            chunk_bytes=self.data[case.kind].num_bytes // NUM_CHUNKS,
            num_processes=case.num_processes,
            shuffled=case.shuffled,
            checked=checked,
        )

    def results(self) -> Iterator[tuple[Case, str, list[Outcome]]]:
        for (case, name), outcomes in self.outcomes.items():
            yield case, name, outcomes


def _bucket(kind: str, name: str) -> str:
    return f"{kind}-{name}"


def _rotated(names: list[str], number: int) -> list[str]:
    start = number % len(names)
    return names[start:] + names[:start]
