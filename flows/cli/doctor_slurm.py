"""`unbroken doctor slurm`: whether this site's Slurm is set as runs need it."""

from __future__ import annotations

from functools import partial

from flows.cli.doctor import Check, check
from infra.settings import load_settings
from infra.slurm.batch import placement
from infra.slurm.commands import Commands
from infra.slurm.requirements import Judgement, judge, judge_partition, parse_config
from infra.slurm.site import Site
from training.errors import UnbrokenError


def run_checks() -> list[Check]:
    """Every check, in order; without an answer from Slurm, only that one."""
    try:
        site = load_settings().slurm
        commands = Commands.at(site.commands)
        config = parse_config(commands.run("scontrol", "show", "config"))
    except UnbrokenError as error:
        return [Check(name="Slurm", is_good=False, found=str(error))]
    partitions = commands.run("scontrol", "--oneliner", "show", "partition").splitlines()
    judged = [*judge(config, has_priorities=bool(site.priorities)), *filter(None, map(judge_partition, partitions))]
    return [
        Check(name="Slurm", is_good=True, found=config.get("SLURM_VERSION", "answers")),
        *(
            check(f"placement {priority or '(no priority)'}", partial(_try, commands, site, priority))
            for priority in ("", *sorted(site.priorities))
        ),
        *map(_told, judged),
    ]


def _told(judgement: Judgement) -> Check:
    found = f"{judgement.found}: {judgement.advice}" if judgement.advice else judgement.found
    return Check(name=judgement.name, is_good=not judgement.advice, found=found)


def _try(commands: Commands, site: Site, priority: str) -> str:
    """Asks Slurm whether it would take a job there, without submitting one."""
    options = {"account": site.account, **placement(priority, site)}
    arguments = [f"--{name}={value}" for name, value in options.items() if value]
    commands.run("sbatch", "--test-only", *arguments, given="#!/bin/sh\n")
    return "a job is taken" + (f" with {' '.join(arguments)}" if arguments else "")
