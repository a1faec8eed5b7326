"""Faults of a host as a machine: its power, its speed, its clock, its disk."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.faults.hosts import Host
from tests.faults.injectors import Lasting
from tests.infra.probes import is_alive

CPU_GROUPS = Path("/sys/fs/cgroup/cpu")
GROUP = "unbroken-test-"
PERIOD_SECONDS = 0.05
FAKETIME = ("/usr/lib/*/faketime/libfaketimeMT.so.1", "libfaketime")
MAX_DISK_BYTES = 4 << 30


@dataclass
class PowerLoss(Lasting):
    """All that runs on a host is gone at once, and nobody is told: they hear no more of it. Healed, it is empty."""

    host: Host
    num_killed: int = field(default=0, init=False)

    def fire(self) -> None:
        victims = self.host.processes()
        self.host.power_off()
        self.num_killed += sum(not is_alive(victim.pid) for victim in victims)

    def heal(self) -> None:
        self.host.power_on()

    @property
    def fired(self) -> bool:
        return self.num_killed > 0


@dataclass
class SlowCpu(Lasting):
    """The processes that a host has now, and those that they start, get this share of one processor.

    By a quota of the kernel's where it has cgroup v1; else they are stopped for the rest of each period.
    """

    host: Host
    share: float
    may_use_cgroup: bool = True
    num_throttled: int = field(default=0, init=False)
    """Periods in which they had to wait."""

    def fire(self) -> None:
        victims = self.host.processes()
        if self.may_use_cgroup and os.access(CPU_GROUPS / "cpu.cfs_quota_us", os.W_OK):
            self._slowed: _Quota | _StopAndGo = _Quota(victims, self.share)
        else:
            self._slowed = _StopAndGo(self.host, self.share)

    def heal(self) -> None:
        self.num_throttled += self._slowed.end()

    @property
    def fired(self) -> bool:
        """Known when it is healed."""
        return self.num_throttled > 0


class _Quota:
    def __init__(self, victims: list[psutil.Process], share: float) -> None:
        _sweep()
        self._group = CPU_GROUPS / f"{GROUP}{os.getpid()}-{uuid.uuid4().hex[:12]}"
        self._group.mkdir()
        period = int(PERIOD_SECONDS * 1e6)
        (self._group / "cpu.cfs_period_us").write_text(str(period))
        (self._group / "cpu.cfs_quota_us").write_text(str(max(1000, int(share * period))))
        for victim in victims:
            _move(victim.pid, self._group)

    def end(self) -> int:
        told = dict(line.split() for line in (self._group / "cpu.stat").read_text().splitlines())
        while pids := (self._group / "cgroup.procs").read_text().split():
            for pid in pids:
                _move(int(pid), CPU_GROUPS)
        self._group.rmdir()
        return int(told["nr_throttled"])


def _sweep() -> None:
    """Remove the empty groups of tests that were killed."""
    for group in CPU_GROUPS.glob(f"{GROUP}*"):
        if not is_alive(int(group.name.removeprefix(GROUP).partition("-")[0])):
            with contextlib.suppress(OSError):
                group.rmdir()


def _move(pid: int, group: Path) -> None:
    with contextlib.suppress(ProcessLookupError):
        (group / "cgroup.procs").write_text(str(pid))


class _StopAndGo:
    def __init__(self, host: Host, share: float) -> None:
        self._host = host
        self._share = share
        self._num_stops = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stop-and-go", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._is_over.wait(self._share * PERIOD_SECONDS):
            stopped = [process for process in self._host.processes() if _send(process, signal.SIGSTOP)]
            self._is_over.wait((1 - self._share) * PERIOD_SECONDS)
            self._num_stops += bool(sum(_send(process, signal.SIGCONT) for process in stopped))

    def end(self) -> int:
        self._is_over.set()
        self._thread.join(timeout=120)
        return self._num_stops


def _send(process: psutil.Process, number: signal.Signals) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)
        return True
    return False


class Clock(Lasting):
    """A clock that goes wrong, for processes that are started with its `environment`.

    The monotonic clock stays right, as on a real host whose clock is set. Skips the test without libfaketime.
    """

    def __init__(self, host: Host, file: Path, *, seconds: float) -> None:
        libraries = sorted(Path("/").glob(FAKETIME[0].lstrip("/")))
        if not libraries:
            pytest.skip(f"no {FAKETIME[0]} (package {FAKETIME[1]})")
        self._host = host
        self._file = file
        self._seconds = seconds
        self._library = libraries[0]
        self._set(0)

    @property
    def environment(self) -> dict[str, str]:
        return {
            "LD_PRELOAD": str(self._library),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }

    def fire(self) -> None:
        self._set(self._seconds)

    def heal(self) -> None:
        self._set(0)

    @property
    def fired(self) -> bool:
        """Whether a process of the host has this clock, and it is wrong."""
        return self.seconds_wrong() != 0 and any(map(self._is_used_by, self._host.processes()))

    def seconds_wrong(self) -> int:
        """As a process sees it that is started now."""
        before = int(time.time())
        told = int(self._host.output(["date", "+%s"], env=self.environment))
        return 0 if before <= told <= time.time() else told - before

    def _is_used_by(self, process: psutil.Process) -> bool:
        with contextlib.suppress(OSError):
            return str(self._library.resolve()) in Path(f"/proc/{process.pid}/maps").read_text()
        return False

    def _set(self, seconds: float) -> None:
        new = self._file.with_suffix(".new")
        new.write_text(f"{seconds:+f}\n")
        new.replace(self._file)


@dataclass
class FullDisk(Lasting):
    """The last byte of a small disk is taken: that of `tests.faults.small_disk`, or of `Host.mount_disk`."""

    folder: Path
    num_refused: int = field(default=0, init=False)
    """Writes."""

    def fire(self) -> None:
        found = os.statvfs(self.folder)
        assert found.f_blocks * found.f_frsize <= MAX_DISK_BYTES, f"{self.folder} is on a disk of this machine"
        file = os.open(self._ballast, os.O_WRONLY | os.O_CREAT)
        try:
            while True:
                os.write(file, bytes(1 << 16))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            self.num_refused += 1
        finally:
            os.close(file)

    def heal(self) -> None:
        self._ballast.unlink()

    @property
    def fired(self) -> bool:
        return self.num_refused > 0

    @property
    def _ballast(self) -> Path:
        return self.folder / "ballast"
