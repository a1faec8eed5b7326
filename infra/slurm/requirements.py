"""What a site's settings must be for the times that docs/slurm.md names: pure judgements of `scontrol show config`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

MAX_SLURMD_TIMEOUT_SECONDS = 60
MAX_CREDENTIAL_SECONDS = 30
DEFAULT_CREDENTIAL_SECONDS = 120
MIN_GRACE_SECONDS = 10


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Of one setting: its value, and what is wrong with it; nothing, if it is well."""

    name: str
    found: str
    advice: str = ""


def parse_config(lines: str) -> dict[str, str]:
    """The settings that `scontrol show config` prints."""
    pairs = (line.split("=", 1) for line in lines.splitlines() if " = " in line or line.rstrip().endswith("="))
    return {name.strip(): value.strip() for name, value in pairs}


def judge(config: Mapping[str, str], *, has_priorities: bool) -> list[Judgement]:
    """In the order in which a person would set them right."""
    judged = [
        _judged("SlurmdTimeout", config, _slurmd_timeout),
        _judged("AuthInfo", config, _credentials),
        _judged("ReturnToService", config, _return_to_service),
    ]
    if has_priorities:
        judged += [_judged("PreemptType", config, _preempt_type), _judged("PreemptMode", config, _preempt_mode)]
    return judged


def judge_partition(line: str) -> Judgement | None:
    """Of a line of `scontrol --oneliner show partition`; None if nobody takes nodes from it."""
    fields = dict(word.split("=", 1) for word in line.split() if "=" in word)
    if fields.get("PreemptMode", "OFF") in ("OFF", "DISABLED"):
        return None
    grace = _number(fields.get("GraceTime", "0"))
    advice = ""
    if grace < MIN_GRACE_SECONDS:
        advice = f"give a preempted node time for a last checkpoint: GraceTime={MIN_GRACE_SECONDS} or more"
    name = f"partition {fields.get('PartitionName', '(no name)')}"
    return Judgement(name=name, found=f"GraceTime={grace}", advice=advice)


def _judged(name: str, config: Mapping[str, str], advise: Callable[[str], str]) -> Judgement:
    value = config.get(name, "(not shown)")
    return Judgement(name=name, found=value, advice=advise(value))


def _slurmd_timeout(value: str) -> str:
    seconds = _number(value)
    if 0 < seconds <= MAX_SLURMD_TIMEOUT_SECONDS:
        return ""
    return (
        f"a dead node's agent is placed anew only after this (the others train on): {MAX_SLURMD_TIMEOUT_SECONDS} s or"
        " less"
    )


def _credentials(value: str) -> str:
    found = re.search(r"cred_expire=(\d+)", value)
    seconds = _number(found[1]) if found else DEFAULT_CREDENTIAL_SECONDS
    if seconds <= MAX_CREDENTIAL_SECONDS:
        return ""
    return f"cred_expire is {seconds} s, by which every requeued job waits longer: AuthInfo=…,cred_expire=5"


def _return_to_service(value: str) -> str:
    return "" if value in ("1", "2") else "a node that comes back stays down until somebody resumes it: 1 or 2"


def _preempt_type(value: str) -> str:
    return "no job makes way for a more urgent one" if value.endswith("none") else ""


def _preempt_mode(value: str) -> str:
    return "" if "REQUEUE" in value else "a job that makes way must be requeued: PreemptMode=REQUEUE"


def _number(value: str) -> int:
    found = re.match(r"\d{1,18}", value)
    return int(found[0]) if found else 0
