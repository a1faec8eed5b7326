"""Views in words and numbers: what the pages and the terminal both say of them."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from flows.monitor.view import AttemptView, NodeView, RankView, RunView
from training.runs.goodput import USES

NOTHING = "–"
SHORT_CAUSE = 300
LOGARITHMIC_RATIO = 30.0
LATE_SECONDS = 20.0
"""A view that is so old says so: what it is read from does not answer."""


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One thing to know of a run; `note` is what stands small beside it."""

    name: str
    value: str
    note: str = ""


def facts(view: RunView, now: float) -> tuple[Fact, ...]:
    """The questions that one has: when is it done, how fast is it, is it safe."""
    return (
        Fact(name="took" if view.is_over else "done", value=_done(view, now), note=_end(view, now)),
        Fact(name="speed", value=_rate(view.samples_per_second, "samples/s"), note=_steps_rate(view)),
        Fact(name="loss", value=NOTHING if view.loss is None else figure(view.loss), note=""),
        Fact(
            name="checkpoint",
            value=f"step {view.checkpoint_step:,}" if view.checkpoint_step else "none yet",
            note=_checkpoint_note(view, now),
        ),
        Fact(
            name="group",
            value=f"{view.group_nodes} of {view.wanted_nodes} nodes",
            note=f"{counted(view.num_ranks, 'rank')}, attempt {view.num_attempts}",
        ),
        Fact(name="productive", value=percent(view.goodput), note="of its time"),
    )


def _done(view: RunView, now: float) -> str:
    if view.is_over:
        if view.began_at is None or view.ended_at is None:
            return NOTHING
        return duration(view.ended_at - view.began_at)
    return f"in {duration(view.expected_end_at - now)}" if view.expected_end_at is not None else NOTHING


def _end(view: RunView, now: float) -> str:
    if view.is_over:
        return f"ended {moment(view.ended_at, now)}" if view.ended_at is not None else ""
    said = f"at {moment(view.expected_end_at, now)}" if view.expected_end_at is not None else "not known yet"
    if view.deadline_at is None:
        return said
    is_late = (view.expected_end_at or now) > view.deadline_at
    return f"{said}; deadline {moment(view.deadline_at, now)}{' will be missed' if is_late else ''}"


def _steps_rate(view: RunView) -> str:
    return _rate(view.steps_per_second, "steps/s") if view.steps_per_second else ""


def _rate(number: float | None, unit: str) -> str:
    return NOTHING if not number else f"{figure(number)} {unit}"


def _checkpoint_note(view: RunView, now: float) -> str:
    every = f"every {view.checkpoint_every_steps:,} steps"
    if view.is_over or not view.checkpoint_step or view.checkpoint_at is None:
        return every
    return f"{duration(now - view.checkpoint_at)} ago, {every}"


def is_logarithmic(numbers: Sequence[float]) -> bool:
    """Whether they differ so much that on an even scale only the largest would be seen."""
    finite = [number for number in numbers if math.isfinite(number)]
    return bool(finite) and min(finite) > 0 and max(finite) > LOGARITHMIC_RATIO * min(finite)


def on_scale(numbers: Sequence[float]) -> list[float]:
    """As high as they are drawn."""
    is_log = is_logarithmic(numbers)
    return [math.log10(number) if is_log and math.isfinite(number) else number for number in numbers]


def lateness(at: float, now: float) -> str:
    """What is to be said of a view of that time; nothing if it is new."""
    if now - at <= LATE_SECONDS:
        return ""
    return f"This is what was seen {duration(now - at)} ago: what it is read from does not answer."


def time_split(view: RunView) -> tuple[tuple[str, float], ...]:
    """What its time went into, as shares of it; what took none is left out."""
    wall = sum(view.seconds.values())
    return tuple((use, view.seconds[use] / wall) for use in USES if wall and view.seconds.get(use))


def rank_cells(rank: RankView, now: float) -> tuple[str, ...]:
    """As `RANK_COLUMNS` has them."""
    return (
        f"{rank.step:,}",
        NOTHING if rank.loss is None else figure(rank.loss),
        f"{duration(max(0.0, now - rank.heard_at))} ago",
        *(milliseconds(s) for s in (rank.busy_seconds, rank.collective_seconds, rank.data_wait_seconds)),
    )


RANK_COLUMNS = ("step", "loss", "heard", "busy", "waits", "data")
RANK_NOTE = "of a step: busy outside of collectives, waits for other ranks, waits for data"


def node_state(node: NodeView) -> str:
    if not node.is_answering:
        return "does not answer"
    return "training" if node.is_training else "in no group"


def node_facts(node: NodeView) -> str:
    """Of its machine, in a line."""
    said = [] if node.sees_store else ["does not see the store"]
    if node.memory_used_share is not None:
        said.append(f"memory {percent(node.memory_used_share)}")
    if node.disk_free_bytes is not None:
        said.append(f"disk {size(node.disk_free_bytes)} free")
    if node.gpu_busy_share is not None:
        said.append(f"GPU {percent(node.gpu_busy_share)}")
    return ", ".join(said)


def attempt_beginning(attempt: AttemptView) -> str:
    ranks = f", {counted(attempt.num_ranks, 'rank')}" if attempt.num_ranks else ""
    return f"step {attempt.from_step:,} from {attempt.source}{ranks}" if attempt.source else "nothing was told of it"


def attempt_end(attempt: AttemptView, view: RunView) -> str:
    return shortened(attempt.why_it_ended) or (view.state if view.is_over else "goes on")


def counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def in_short(view: RunView, now: float) -> str:
    """What one wants to know of one run among others."""
    found = {fact.name: fact for fact in facts(view, now)}
    if view.is_over:
        return f"{found['took'].note}, took {found['took'].value}" if view.ended_at else ""
    parts = (f"done {found['done'].value}", found["speed"].value, f"checkpoint {found['checkpoint'].value}")
    return ", ".join(part for part in parts if NOTHING not in part)


def shortened(text: str, length: int = SHORT_CAUSE) -> str:
    """One line of at most `length` signs, none of which a terminal would obey."""
    line = " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
    return line if len(line) <= length else line[: length - 1] + "…"


def figure(number: float) -> str:
    """Three or four digits that count; nan as nan."""
    if not math.isfinite(number):
        return str(number)
    if abs(number) >= 100 or number == 0:
        return f"{number:,.0f}"
    if abs(number) >= 1:
        return f"{number:.1f}" if abs(number) >= 10 else f"{number:.2f}"
    return f"{number:.3g}"


def percent(share: float | None) -> str:
    if share is None:
        return NOTHING
    return f"{share:.0%}" if share >= 0.1 or not share else f"{share:.1%}"


def milliseconds(seconds: float | None) -> str:
    return NOTHING if seconds is None else f"{figure(1000 * seconds)} ms" if seconds < 1 else f"{seconds:.1f} s"


def size(num_bytes: float) -> str:
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if num_bytes < 1000 or unit == "TB":
            break
        num_bytes /= 1000
    return f"{num_bytes:.0f} {unit}"


def duration(seconds: float) -> str:
    """In the two units that say most."""
    whole = max(0, round(seconds))
    parts = [(whole // 86_400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "min"), (whole % 60, "s")]
    first = next((place for place, (number, _) in enumerate(parts) if number), len(parts) - 1)
    return " ".join(f"{number} {unit}" for number, unit in parts[first : first + 2] if number) or "0 s"


def moment(at: float, now: float) -> str:
    """On this machine's clock; with its day, if that is another."""
    then, today = time.localtime(at), time.localtime(now)
    return time.strftime("%H:%M:%S" if then[:3] == today[:3] else "%Y-%m-%d %H:%M", then)
