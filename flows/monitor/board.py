"""What was seen last, by whoever looks, for whoever asks."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import psutil

from flows.monitor.page import runs_page, servers_page
from flows.monitor.view import Overview, RunView, Servers
from infra.settings import Settings
from tasks.mlflow_client import MACHINE_LEARNING
from training.cluster.machine import device_of
from training.runs.exposition import Page
from training.s3.objectstore import StoreLocation


class Runs(Protocol):
    """flows.monitor.runs.Runs, as far as it is asked here."""

    @property
    def views(self) -> Mapping[str, RunView]: ...

    def find(self, key: str) -> RunView: ...


class Board:
    """Whoever looks at the servers puts what it saw into `servers`."""

    def __init__(self, settings: Settings, location: StoreLocation, runs: Runs) -> None:
        self._settings = settings
        self._location = location
        self._runs = runs
        self.servers = Servers(at=time.time())

    def metrics(self) -> str:
        page, disk = Page(), psutil.disk_usage(str(self._settings.home))
        labels = {"device": device_of(str(self._settings.home))}
        page.add("unbroken_stack_disk_bytes", disk.total, "Size of the disk under the stack's folder", labels)
        page.add("unbroken_stack_disk_free_bytes", disk.free, "What is free there", labels)
        return runs_page(self._runs.views.values()).text() + servers_page(self.servers).text() + page.text()

    def overview(self) -> Overview:
        """Of each run what there is to say in short."""
        disk = psutil.disk_usage(str(self._settings.home))
        runs = [replace(run, curve=(), attempts=()) for run in self._runs.views.values()]
        runs.sort(key=lambda run: (run.is_over, -(run.began_at or run.at)))
        return Overview(
            at=time.time(),
            runs=tuple(runs),
            servers=self.servers,
            disk_bytes=disk.total,
            disk_free_bytes=disk.free,
            links=self._links(),
        )

    def run(self, key: str) -> RunView:
        """With its nodes and alerts. Raises as `Runs.find`."""
        view, maybe_alerts = self._runs.find(key), self.servers.alerts
        if maybe_alerts is None:
            return view
        return replace(view, alerts=tuple(alert for alert in maybe_alerts if alert.run in (view.short_key, "")))

    def _links(self) -> dict[str, str]:
        settings, found = self._settings, {}
        if settings.maybe_prefect_api_url:
            found["Prefect"] = f"{settings.prefect_ui_url}/runs"
        if settings.maybe_mlflow_uri:
            found["MLflow"] = f"{settings.mlflow_uri}/#/experiments{MACHINE_LEARNING}"
        return {**found, "S3": self._location.uri()}
