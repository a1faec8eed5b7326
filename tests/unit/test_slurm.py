"""What Slurm is asked for, and what its answers mean: pure functions."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from infra.launcher import JobSpec, Needs
from infra.slurm.batch import placement, sbatch_arguments, script
from infra.slurm.commands import Commands
from infra.slurm.offer import what_would_fit
from infra.slurm.requirements import judge, judge_partition, parse_config
from infra.slurm.site import Site
from infra.slurm.tasks import job_name, parse_tasks
from training.errors import InfrastructureError, UserError

NEEDS = Needs(num_cpus=6, memory_bytes=(3 << 20) + 1, num_gpus=2, time_limit_seconds=61, priority="high")
SPEC = JobSpec(key="k", num_nodes=3, command=("agent", "{node}", "a b"), environment={"WHERE": "x"}, needs=NEEDS)
SITE = Site(partition="gpu", account="us", priorities={"high": "qos=urgent", "low": "partition=spare"})
GOOD = {"SlurmdTimeout": "30 sec", "AuthInfo": "cred_expire=5", "ReturnToService": "2"}


def test_a_spec_becomes_options() -> None:
    found = sbatch_arguments(SPEC, SITE, name="n", log_folder=Path("/logs"))
    for option in (
        *("--parsable", "--requeue", "--array=0-2", "--nodes=1", "--ntasks=1", "--cpus-per-task=6", "--mem=4M"),
        *("--gres=gpu:2", "--time=2", "--partition=gpu", "--qos=urgent", "--account=us", "--output=/logs/node%a.log"),
    ):
        assert option in found
    (exported,) = (option for option in found if option.startswith("--export="))
    assert "WHERE" in exported.split("=", 1)[1].split(",")
    assert not any("=x" in option for option in found), "values of variables are on no command line"


def test_what_is_not_asked_for_is_left_to_slurm() -> None:
    found = sbatch_arguments(
        JobSpec(key="k", num_nodes=1, command=(), environment={}), Site(), name="n", log_folder=Path("/logs")
    )
    for name in ("cpus-per-task", "mem", "gres", "time", "partition", "qos", "account"):
        assert not any(option.startswith(f"--{name}=") for option in found)


def test_the_script_is_one_step() -> None:
    text = script(SPEC)
    assert text.startswith("#!/bin/sh\nexec srun --quiet --kill-on-bad-exit=0 --cpus-per-task=6 ")
    assert text.endswith(" -m infra.slurm.node k agent '{node}' 'a b'\n")


def test_priorities_are_the_sites() -> None:
    assert placement("low", SITE) == {"partition": "spare", "qos": ""}
    with pytest.raises(UserError, match=r"launch.priority = 'hi' is not one of this site's \(high, low\)"):
        placement("hi", SITE)


def test_only_this_stores_runs_are_seen() -> None:
    ours, theirs = job_name("m", "key"), job_name("other", "key")
    lines = [f"7|0|{ours}|PENDING|Resources|", f"8|1|{theirs}|RUNNING|None|n1", "9|N/A|x|RUNNING|None|n2"]
    (task,) = parse_tasks("\n".join(lines), mark="m")
    assert (task.job_id, task.node, task.key, task.describe()) == ("7", "0", "key", "PENDING (Resources)")
    assert not task.is_held


def test_settings_are_judged() -> None:
    assert all(not found.advice for found in judge(GOOD, has_priorities=False))
    bad = parse_config("SlurmdTimeout = 300 sec\nAuthInfo = (null)\nReturnToService = 0\nPreemptType = preempt/none\n")
    advice = {found.name: found.advice for found in judge(bad, has_priorities=True)}
    assert "60 s or less" in advice["SlurmdTimeout"]
    assert "cred_expire is 120 s" in advice["AuthInfo"]
    assert "stays down" in advice["ReturnToService"]
    assert "no job makes way" in advice["PreemptType"]
    assert "PreemptMode=REQUEUE" in advice["PreemptMode"]


def test_grace_times_are_judged_where_nodes_are_taken() -> None:
    short = judge_partition("PartitionName=low GraceTime=3 PreemptMode=REQUEUE")
    assert short is not None
    assert "GraceTime=10 or more" in short.advice
    long = judge_partition("PartitionName=low GraceTime=15 PreemptMode=REQUEUE")
    assert long is not None
    assert not long.advice
    assert judge_partition("PartitionName=high GraceTime=0 PreemptMode=OFF") is None


@pytest.mark.parametrize("line", ["slurm_load_jobs error", "7|0|x|RUNNING", "7|0|x|RUNNING|None|n1|more", ""])
def test_what_is_no_queue_is_named(line: str) -> None:
    with pytest.raises(InfrastructureError, match="squeue printed"):
        parse_tasks(f"{line}\n", mark="m")


def test_odd_settings_are_judged_too() -> None:
    assert judge_partition("GraceTime=UNLIMITED PreemptMode=REQUEUE") is not None
    assert judge_partition(f"PartitionName=a GraceTime={'9' * 5000} PreemptMode=REQUEUE") is not None
    judge({**GOOD, "AuthInfo": f"cred_expire={'9' * 5000}", "SlurmdTimeout": "9" * 5000}, has_priorities=False)


def test_an_offer_that_is_none_is_shown_as_it_is() -> None:
    commands = cast(Commands, SimpleNamespace(run=lambda *arguments: "no|such\na|up|2|3|4|gpu:1|1:00"))
    assert what_would_fit(commands).splitlines()[1:] == [
        "  no|such",
        "  partition a (up): 2 nodes, each with 3 CPUs, 4 MiB and gpu:1, for at most 1:00",
    ]
