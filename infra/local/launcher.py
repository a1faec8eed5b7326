"""The local engine: a job is a group of supervised processes on this machine, one agent per node.

supervisord owns them, so the process that submitted may die; it restarts an agent that dies, but not one that is done
(0), was given wrong input (2) or met a failure that would repeat (4).
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from xmlrpc.client import Fault  # nosec B411 # our own supervisor's socket

from infra.launcher import CANCELLED, JobSpec, JobState, JobStatus, is_others
from infra.local import supervisor
from infra.local.files import locked, write_whole
from infra.local.node import job_path
from infra.local.room import require_room
from infra.restarts import FINAL_CODES
from training.errors import FencedError, InfrastructureError, UserError

BAD_NAME, ALREADY_ADDED, STILL_RUNNING = 10, 90, 91  # supervisor.xmlrpc.Faults
NUM_TRIES = 20
OPTIONS = {
    "process_name": "node%(process_num)d",
    "autorestart": "unexpected",
    "exitcodes": ",".join(map(str, FINAL_CODES)),
    "startsecs": "0",  # a quick end is an end; infra.local.node limits quick failures
    "stopwaitsecs": "10",
}


class LocalLauncher:
    """Implements `infra.launcher.Launcher` on the local stack's supervisord."""

    def __init__(self, home: Path) -> None:
        self._home = home

    def submit(self, spec: JobSpec) -> None:
        require_room(spec)
        with self._lock(spec.key):
            self._finish_cancelling(spec.key)
            status = self.find(spec.key)
            is_at_work = status is not None and status.state is JobState.RUNNING and self._is_same(spec)
            self._add_owner(spec)  # before the job runs: an owner who is cancelled meanwhile must find it
            if not is_at_work:
                self._start(spec)

    def _is_same(self, spec: JobSpec) -> bool:
        """Whether the job that runs is the one that is asked for; if not, that one is to begin in its place."""
        running = json.loads(job_path(self._home, spec.key).read_text())
        if running["store"] != spec.store:
            raise UserError(
                f"a run of key {spec.key[:12]} is at work for {running['store']}: wait for it, or cancel it there"
                " (`unbroken runs cancel`), before it runs for " + spec.store
            )
        if running["generation"] > spec.generation:
            raise FencedError(f"run {spec.key[:12]} was begun anew by somebody else")
        same_environment = running["environment"] == _environment(spec)  # else the stack has moved to other ports
        same_program = running["command"][:3] == list(spec.command[:3])  # else the project has moved that module
        return bool(running["generation"] == spec.generation and same_environment and same_program)

    def find(self, key: str) -> JobStatus | None:
        with supervisor.calls():
            infos = [info for info in self._remote().getAllProcessInfo() if info["group"] == key]
        if not self._config(key).exists():  # cancelled, although its last nodes may just be ending
            return None
        state = JobState.ENDED if not infos or any(map(_is_over, infos)) else JobState.RUNNING
        return JobStatus(state=state, nodes={info["name"]: info["statename"] for info in infos})

    def jobs(self) -> Mapping[str, Sequence[str]]:
        folder = self._home / "jobs"
        known = {path.stem: self._owners(path.stem) for path in sorted(folder.glob("*.conf"))}
        cancelled = {path.stem: [*self._owners(path.stem), CANCELLED] for path in folder.glob("*.cancelled")}
        return known | cancelled

    def logs(self, key: str) -> Sequence[Path]:
        return sorted(self._log_folder(key).glob("*.log"))

    def reap(self, key: str) -> None:
        with self._lock(key):
            self._finish_cancelling(key)
            status = self.find(key)
            if status is not None and status.state is JobState.ENDED:
                with supervisor.calls(), contextlib.suppress(Fault):  # the engine knows it no more
                    self._remote().stopProcessGroup(key)
                supervisor.kill_group(supervisor.stack_id(self._home), key)

    def cancel(self, key: str, *, by: set[str] | None = None) -> bool:
        with self._lock(key):
            if is_others(self._owners(key), by):
                return False
            with contextlib.suppress(FileNotFoundError):  # first: a supervisor that starts again must not start the job
                self._config(key).replace(self._cancelled(key))
            job_path(self._home, key).unlink(missing_ok=True)  # nor a node that is started again do anything
            self._stop_and_remove(key)
            self._forget(key)
        return True

    def _finish_cancelling(self, key: str) -> None:
        """If whoever cancelled the job died amid that."""
        if self._cancelled(key).exists():
            self._stop_and_remove(key)
            self._forget(key)

    def _start(self, spec: JobSpec) -> None:
        self._stop_and_remove(spec.key)
        for path in self._files(f"{spec.key}.starts"):
            path.unlink(missing_ok=True)
        self._write(spec)
        try:
            with supervisor.calls():
                self._remote().reloadConfig()
                self._remote().addProcessGroup(spec.key)
        except Fault as fault:
            if fault.faultCode != ALREADY_ADDED:
                self._forget(spec.key)  # supervisord could not read its configuration again, for any job
                raise InfrastructureError(f"the local engine refused job {spec.key[:12]}: {fault}") from fault

    def _write(self, spec: JobSpec) -> None:
        """Supervisord's own form knows no quoting, so command and environment go past it."""
        log = self._log_folder(spec.key) / "node{node}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        job = {
            "command": spec.command,
            "environment": _environment(spec),
            "store": spec.store,
            "generation": spec.generation,
        }
        write_whole(job_path(self._home, spec.key), json.dumps(job), mode=0o600)
        section = supervisor.program_section(
            spec.key,
            (sys.executable, "-P", "-m", "infra.local.node", str(self._home), spec.key, "{node}"),
            log=log,
            environment={},
            directory=self._home,
            options={**OPTIONS, "numprocs": str(spec.num_nodes)},
        )
        write_whole(self._config(spec.key), section)

    def _stop_and_remove(self, key: str) -> None:
        """Again, if a node was restarted in between. What left its node's process group is killed too."""
        for _ in range(NUM_TRIES):
            try:
                with supervisor.calls():
                    self._remote().stopProcessGroup(key)
                    self._remote().removeProcessGroup(key)
            except Fault as fault:
                if fault.faultCode == BAD_NAME:
                    supervisor.kill_group(supervisor.stack_id(self._home), key)
                    return
                if fault.faultCode != STILL_RUNNING:
                    raise InfrastructureError(f"the local engine cannot stop job {key[:12]}: {fault}") from fault
        raise InfrastructureError(f"the local engine cannot stop job {key[:12]}: its nodes are always starting")

    def _lock(self, key: str) -> AbstractContextManager[None]:
        """One at a time per key. Keys share 256 files, so that these do not pile up."""
        return locked(self._home / "jobs" / "locks" / key[:2])

    def _remote(self) -> Any:
        return supervisor.remote(self._home)

    def _files(self, beginning: str) -> list[Path]:
        return list((self._home / "jobs").glob(f"{beginning}*"))

    def _forget(self, key: str) -> None:
        self._config(key).unlink(missing_ok=True)
        for path in {*self._files(f"{key}.")} - {self._cancelled(key)}:
            path.unlink(missing_ok=True)
        self._cancelled(key).unlink(missing_ok=True)  # last: until then there is something left to do

    def _config(self, key: str) -> Path:
        return self._home / "jobs" / f"{key}.conf"

    def _cancelled(self, key: str) -> Path:
        """Its configuration under a name that the supervisor does not read."""
        return self._home / "jobs" / f"{key}.cancelled"

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


def _environment(spec: JobSpec) -> dict[str, str]:
    return {"GLOO_SOCKET_IFNAME": "lo", **spec.environment}


def _is_over(info: Mapping[str, Any]) -> bool:
    """Not over: a node that is about to be started for the first time, or again."""
    if info["statename"] == "EXITED":
        return info["exitstatus"] in FINAL_CODES
    if info["statename"] == "STOPPED":
        return bool(info["start"])
    return bool(info["statename"] == "FATAL")
