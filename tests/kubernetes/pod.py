"""A pod of a manifest, as far as Linux alone can make it: what its security settings leave to the process inside.

User and group, no capabilities and no way to new ones, the root file system read-only, memory and scratch mounted
where the manifest says, processes that see one another only. Its network is this machine's.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

UNSHARE = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c")
PYTHONS = sysconfig.get_path("scripts")
PAUSE = 'setpriv "$@" & wait $!'
"""The pod's first process is not the agent, since its containers share their processes."""


def require_pods() -> None:
    """Skips a test where such a pod cannot be made."""
    if os.geteuid() != 0 or not (shutil.which("unshare") and shutil.which("setpriv")):
        pytest.skip("a pod's view of the machine takes root and util-linux")
    if _closed_folder(Path(__file__)) or _closed_folder(Path(PYTHONS)):
        pytest.skip("the user of a pod may not read this repository and its environment")


@dataclass(frozen=True, kw_only=True)
class Pod:
    """A running pod of an indexed job."""

    process: subprocess.Popen[str]
    log: Path

    def evict(self) -> None:
        """As the kubelet does: SIGTERM to the container's own process."""
        (first,) = psutil.Process(self.process.pid).children()
        (agent,) = first.children()
        agent.send_signal(signal.SIGTERM)

    def exit_code(self) -> int:
        return self.process.wait(timeout=120)


def start(template: Mapping[str, Any], *, index: int, secret: Mapping[str, str], log: Path) -> Pod:
    """`secret` is what the manifest refers to by name; the pod's address is loopback."""
    (container,) = template["spec"]["containers"]
    variables = {
        "PATH": f"{PYTHONS}:/usr/bin:/bin",
        "JOB_COMPLETION_INDEX": str(index),
        **secret,
        **{variable["name"]: variable.get("value", "127.0.0.1") for variable in container["env"]},
    }
    command = [re.sub(r"\$\((\w+)\)", lambda found: variables[found[1]], word) for word in container["command"]]
    with log.open("a") as file:
        process = subprocess.Popen(
            [*UNSHARE, "\n".join([*_mounts(container), PAUSE]), "pause", *_privileges(template, container), *command],
            env=variables,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            text=True,
        )
    return Pod(process=process, log=log)


def _mounts(container: Mapping[str, Any]) -> list[str]:
    assert container["securityContext"]["readOnlyRootFilesystem"]
    scratch = [f"mount -t tmpfs -o mode=1777 tmpfs {mount['mountPath']}" for mount in container["volumeMounts"]]
    root = ["mount -o remount,bind,ro /", "mount -t proc proc /proc"]
    return ["set -e", "mount --make-rprivate /", *_interpreter(), *root, *scratch]


def _interpreter() -> list[str]:
    """Python itself may lie in root's own home, as no image has it: its folder alone is shown there."""
    closed = _closed_folder(Path(sys.base_prefix))
    if closed is None:
        return []
    aside = ["mount -t tmpfs tmpfs /mnt", "mkdir /mnt/python", f"mount --bind {sys.base_prefix} /mnt/python"]
    cover = [f"mount -t tmpfs -o mode=755 tmpfs {closed}", f"mkdir -p {sys.base_prefix}"]
    return [*aside, *cover, f"mount --bind /mnt/python {sys.base_prefix}"]


def _closed_folder(path: Path) -> Path | None:
    """The first of the folders on the way to a path that are not open to everybody."""
    folders = reversed(path.resolve().parents)
    return next((folder for folder in folders if folder.stat().st_mode & 0o005 != 0o005), None)


def _privileges(template: Mapping[str, Any], container: Mapping[str, Any]) -> list[str]:
    whole, own = template["spec"]["securityContext"], container["securityContext"]
    assert not own["allowPrivilegeEscalation"]
    assert own["capabilities"] == {"drop": ["ALL"]}
    user = [f"--reuid={whole['runAsUser']}", f"--regid={whole['runAsGroup']}", "--clear-groups"]
    return [*user, "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
