"""A watched run of four nodes, and trying what is told of a fault of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.agents import Agents
from tests.faults.alerting import Site
from tests.faults.hosts import Cluster
from training.cluster.metrics import short

NUM_HOSTS = 4
STACK_DISK_HOST, DISK_HOST = 2, 3
"""Hosts whose TMPDIR is on a disk of its own, and which are not killed; one's is the stack's too, as on a laptop."""
DISK_MIB = 64
START_SECONDS = 200.0
"""At most, on a busy machine: four processes import torch."""


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """A fault, and what is to be told of it."""

    fault: str
    alert: str
    windows: Sequence[str]
    """What must pass before the message, by their names in windows.toml."""
    fire: Callable[[], None]
    heal: Callable[[], None]
    says: Sequence[str]
    """In summary and cause."""
    follows: Sequence[str] = ()
    """Alerts that fire as well, and are told of to nobody."""
    is_of_run: bool = True
    num_alerts: int = 1
    """In the one message."""


@dataclass
class Trial:
    """One run of four nodes, and all that watches it."""

    agents: Agents
    cluster: Cluster
    site: Site
    disks: Mapping[int, Path]
    """By host, as this process sees them."""
    folder: Path
    """Of this test's own."""

    def start(self, number: int) -> None:
        has_disk = number in (STACK_DISK_HOST, DISK_HOST)
        env = {"TMPDIR": str(disk_folder(self.folder, number))} if has_disk else {}
        self.agents.start(self.cluster.hosts[number], env=env)

    def start_all(self) -> None:
        """Until speeds are known, and the first checkpoint is there."""
        for number in range(NUM_HOSTS):
            self.start(number)
        for sight in ("unbroken_run_checkpoint_step > 0", f"count(rank:unbroken_pace_seconds:mean) == {NUM_HOSTS}"):
            self.site.wait_for(sight, timeout_seconds=START_SECONDS)

    def try_out(self, alarm: Alarm) -> dict[str, Any]:
        """A row of the evidence. Fails if anything else was told than this alert, once, and that it is over, once."""
        site = self.site
        site.wait_until_calm()
        site.forget()
        before, began, since = len(site.messages), time.monotonic(), time.time()
        alarm.fire()
        try:
            told = site.wait_for_message(before)
            for name in alarm.follows:
                site.wait_for(f'ALERTS{{alertname="{name}",alertstate="firing"}}')
        finally:
            healed = time.monotonic()
            alarm.heal()
        over = site.wait_for_message(before + 1)
        site.wait_until_calm()
        seen = [message.told(since=since) for message in site.messages[before:]]
        fired = site.fired(time.monotonic() - began)
        names = " ".join([alarm.alert] * alarm.num_alerts)
        assert seen == [f"firing: {names}", f"resolved: {names}"], (alarm.fault, seen, fired)
        assert set(alarm.follows) <= set(fired)
        alerts = told.alerts(since=since)
        self._require_text(alarm, alerts)
        return {
            "fault": alarm.fault,
            "alert": alarm.alert,
            "seconds_to_message": round(told.at - began, 1),
            "windows": list(alarm.windows),
            "seconds_from_healing_to_resolved": round(over.at - healed, 1),
            "messages": seen,
            "fired_but_not_told": [name for name in fired if name != alarm.alert],
            "text": {
                name: alerts[0]["annotations"][name].replace(str(self.folder), "FOLDER")
                for name in ("summary", "cause", "link")
            },
        }

    def _require_text(self, alarm: Alarm, alerts: Sequence[dict[str, Any]]) -> None:
        text = " | ".join(alert["annotations"][part] for alert in alerts for part in ("summary", "cause"))
        assert [word for word in alarm.says if word not in text] == [], text
        if alarm.is_of_run:
            run, said = short(self.agents.run.run_key), alerts[0]["annotations"]
            assert alerts[0]["labels"]["run"] == run
            assert f"run {run}" in said["summary"]
            assert said["link"].endswith(f"/runs/flow-run/{self.site.flow_run}")


def disk_folder(folder: Path, number: int) -> Path:
    return folder / f"disk{number}"


def mount_disks(cluster: Cluster, folder: Path) -> dict[int, Path]:
    """Where this process finds them, by host."""
    found = {}
    for number in (STACK_DISK_HOST, DISK_HOST):
        disk_folder(folder, number).mkdir()
        found[number] = cluster.hosts[number].mount_disk(disk_folder(folder, number), mebibytes=DISK_MIB)
    return found
