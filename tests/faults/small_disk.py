"""A SeaweedFS of its own on a disk that a test can fill: what a store answers then is the store's own doing."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from infra.local.ports import USUAL, choose_ports
from infra.local.services import Service, s3_service
from infra.settings import credentials_path
from tests.faults.machine import FullDisk
from tests.waiting import wait_until
from training.s3.objectstore import Store, StoreLocation

DISK_MIB = 64
UNSHARE = ("unshare", "--user", "--map-root-user", "--mount")
"""A mount that only the server sees, that needs no privilege, and is gone when the server is."""


@dataclass(frozen=True, kw_only=True)
class SmallDisk:
    """The server's store, and its disk as other processes see it."""

    store: Store
    folder: Path

    def fill(self) -> None:
        FullDisk(self.folder).fire()

    def make_room(self) -> None:
        FullDisk(self.folder).heal()


@contextlib.contextmanager
def small_disk(home: Path) -> Iterator[SmallDisk]:
    """Skips the test where a user may not mount in a namespace of their own."""
    if subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("no namespaces for users here")
    (home / "logs").mkdir(parents=True)
    service = s3_service(home, choose_ports({}, {}, lost=USUAL.values()))
    mounted = f'mount -t tmpfs -o size={DISK_MIB}m none "$0" && exec "$@"'
    with (home / "logs" / "weed").open("w") as log:
        command = [*UNSHARE, "sh", "-c", mounted, str(home / "s3"), *service.command]
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("AWS_SHARED_CREDENTIALS_FILE", str(credentials_path(home)))
            yield SmallDisk(store=_store(service), folder=Path(f"/proc/{server.pid}/root{home}/s3"))
    finally:
        server.kill()  # on a full disk it would not end by itself
        server.wait(timeout=120)


def _store(service: Service) -> Store:
    wait_until(service.is_healthy, what="SeaweedFS on the small disk")
    store = Store(StoreLocation(endpoint=service.url, bucket="small"))
    store.create_bucket_if_missing()
    return store
