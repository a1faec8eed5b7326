"""Where code came from."""

from __future__ import annotations

import subprocess

from training.config import Preset


def commit_of(preset: Preset) -> str:
    """The git commit of the recipe's folder, with `+changes` if files there differ from it; "none" outside of git."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", preset.folder, *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "HEAD")
    return (commit + ("+changes" if git("status", "--porcelain", ".") else "")) if commit else "none"
