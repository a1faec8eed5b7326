"""The local engine: a job is a group of supervised processes on this machine, one agent per node.

supervisord owns them, so the process that submitted may die; it restarts an agent that dies, but not one that is done
(0), was given wrong input (2) or met a failure that would repeat (4).
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xmlrpc.client import Fault

from infra.launcher import JobSpec, JobState, JobStatus
from infra.local import supervisor
from training.errors import InfrastructureError

ALREADY_ADDED = 90  # supervisor.xmlrpc.Faults
FINAL_CODES = (0, 2, 4)
OPTIONS = {
    "process_name": "node%(process_num)d",
    "autorestart": "unexpected",
    "exitcodes": ",".join(map(str, FINAL_CODES)),
    "startsecs": "0",
    "stopwaitsecs": "10",
}


class LocalLauncher:
    """Implements `infra.launcher.Launcher` on the local stack's supervisord."""

    def __init__(self, home: Path) -> None:
        self._home = home

    def submit(self, spec: JobSpec) -> None:
        with self._alone(spec.key):
            self._submit(spec)

    def _submit(self, spec: JobSpec) -> None:
        self._add_owner(spec)
        status = self.find(spec.key)
        if status is not None and status.state is JobState.RUNNING:
            return
        if status is not None:
            self._remote().removeProcessGroup(spec.key)
        log = self._log_folder(spec.key) / "node{node}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        section = supervisor.program_section(
            spec.key,
            spec.command,
            log=log,
            environment={"GLOO_SOCKET_IFNAME": "lo", **spec.environment},
            directory=self._home,
            options={**OPTIONS, "numprocs": str(spec.num_nodes)},
        )
        with self._alone("supervisor"):  # it reads all jobs' files at once
            self._config(spec.key).write_text(section)
            try:
                self._remote().reloadConfig()
                self._remote().addProcessGroup(spec.key)
            except Fault as fault:
                if fault.faultCode != ALREADY_ADDED:
                    self._config(spec.key).unlink()
                    self._owners_file(spec.key).unlink(missing_ok=True)
                    raise InfrastructureError(f"the local engine refused job {spec.key[:12]}: {fault}") from fault

    def find(self, key: str) -> JobStatus | None:
        found = [info for info in self._processes() if info["group"] == key]
        if not found:
            return None
        nodes = {info["name"]: info["statename"] for info in found}
        over = all(_is_over(info) for info in found)
        return JobStatus(state=JobState.ENDED if over else JobState.RUNNING, nodes=nodes)

    def jobs(self) -> Mapping[str, Sequence[str]]:
        configs = (self._home / "jobs").glob("*.conf")
        return {path.stem: self._owners(path.stem) for path in sorted(configs)}

    def logs(self, key: str) -> Sequence[Path]:
        return sorted(self._log_folder(key).glob("*.log"))

    def cancel(self, key: str) -> None:
        with self._alone(key):
            self._config(key).unlink(missing_ok=True)
            self._owners_file(key).unlink(missing_ok=True)
            if self.find(key) is None:
                return
            remote = self._remote()
            with contextlib.suppress(Fault):  # another canceller was first
                remote.stopProcessGroup(key)
                remote.removeProcessGroup(key)
            supervisor.kill_group(supervisor.stack_id(self._home), key)

    @contextlib.contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """Changes of one job are made one at a time, by whichever process."""
        (self._home / "jobs").mkdir(parents=True, exist_ok=True)
        with (self._home / "jobs" / f"{name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _remote(self) -> Any:
        return supervisor.remote(self._home)

    def _processes(self) -> Sequence[Mapping[str, Any]]:
        try:
            return list(self._remote().getAllProcessInfo())
        except OSError as error:
            raise InfrastructureError(
                "the local engine is not running: start it with `unbroken up` (or `make up`)"
            ) from error

    def _config(self, key: str) -> Path:
        return self._home / "jobs" / f"{key}.conf"

    def _owners_file(self, key: str) -> Path:
        return self._home / "jobs" / f"{key}.owners"

    def _log_folder(self, key: str) -> Path:
        return self._home / "logs" / "jobs" / key

    def _add_owner(self, spec: JobSpec) -> None:
        if spec.owner is not None and spec.owner not in self._owners(spec.key):
            with self._owners_file(spec.key).open("a") as file:
                file.write(spec.owner + "\n")

    def _owners(self, key: str) -> list[str]:
        path = self._owners_file(key)
        return path.read_text().split() if path.exists() else []


def _is_over(info: Mapping[str, Any]) -> bool:
    """Between its end and its restart, a process that will be restarted is EXITED for a moment."""
    state = info["statename"]
    return state in ("FATAL", "STOPPED") or (state == "EXITED" and info["exitstatus"] in FINAL_CODES)
