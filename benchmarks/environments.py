"""Who takes part in a bench, and the environment where its library is installed, made once and kept."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENTS = ROOT / ".bench"


@dataclass(frozen=True)
class Contestant:
    """A file of `contestants/`, and what must be installed for it (nothing: this project's own environment has it)."""

    name: str
    title: str
    requirements: tuple[str, ...] = ()


def ready_python(contestant: Contestant, environments: Path) -> str:
    """The interpreter to run it with; its environment is made first if need be."""
    if not contestant.requirements:
        return sys.executable
    folder = environments / contestant.name
    wanted, noted = "\n".join(contestant.requirements), folder / "requirements.txt"
    if not noted.exists() or noted.read_text() != wanted:
        print(f"installing {wanted.split()[0]} …", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *contestant.requirements]
        subprocess.run(pip, check=True)
        noted.write_text(wanted)
    return str(folder / "bin" / "python")
