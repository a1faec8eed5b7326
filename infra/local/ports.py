"""Which ports the services listen on: those of last time, else the usual ones, else any that are free."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Collection, Mapping
from typing import Any

import psutil

from training.errors import UserError

LOOPBACK = "127.0.0.1"
USUAL = {"s3": 8333, "mlflow": 5000, "prefect": 4200, "monitor": 9480, "prometheus": 9090, "alertmanager": 9093}
INTERNAL = (
    "s3_grpc",
    "master",
    "master_grpc",
    "volume",
    "volume_grpc",
    "filer",
    "filer_grpc",
    "admin",
    "admin_grpc",
)
"""SeaweedFS's own parts, which talk to one another only."""


def choose_ports(
    last: Mapping[str, int],
    configured: Mapping[str, Any],
    *,
    served: Collection[str] = (),
    lost: Collection[int] = (),
) -> dict[str, int]:
    """A free port for each name; `served` ones stay, since the stack itself listens there.

    `lost` ones may look free: who took them may be about to take them again.

    Raises `UserError` if a port that the user asked for is taken.
    """
    kept = {*served, *(INTERNAL if "s3" in served else ())}
    chosen = {name: last[name] for name in kept if name in last}
    for name in sorted(USUAL.keys() - chosen.keys()):
        wanted = os.environ.get(f"UNBROKEN_{name.upper()}_PORT") or configured.get(name)
        if wanted is not None:
            chosen[name] = _wanted(name, wanted, chosen)
    for name, usual in USUAL.items():
        if name not in chosen:
            chosen[name] = _first_free([last.get(name, usual), usual], taken={*chosen.values(), *lost})
    for name in sorted(set(INTERNAL) - chosen.keys()):
        chosen[name] = _first_free([last[name]] if name in last else [], taken={*chosen.values(), *lost})
    return chosen


def _wanted(name: str, wanted: Any, taken: Mapping[str, int]) -> int:
    try:
        port = int(wanted)
    except ValueError as error:
        raise UserError(f"port of {name}: {wanted!r} is not a number") from error
    if not 1 <= port <= 65535:
        raise UserError(f"port of {name}: {port} must lie between 1 and 65535")
    if port in taken.values():
        raise UserError(f"port {port} is configured for two services: give {name} another")
    if not is_free(port):
        raise UserError(
            f"port {port}, configured for {name}, is in use{_by_whom(port)}: free it, or configure another in"
            f" unbroken.toml, [ports] {name}, or in UNBROKEN_{name.upper()}_PORT"
        )
    return port


def _first_free(candidates: list[int], *, taken: Collection[int]) -> int:
    for port in candidates:
        if port not in taken and is_free(port):
            return port
    while (port := free_port()) in taken:
        pass
    return port


def listening_ports(process: psutil.Process) -> set[int]:
    """Where a process, or one that descends from it, takes calls."""
    found: set[int] = set()
    with contextlib.suppress(psutil.Error):  # it ended meanwhile
        for member in (process, *process.children(recursive=True)):
            connections = member.net_connections("tcp")
            found |= {c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN}
    return found


def free_port() -> int:
    """Any port that is free on loopback right now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


def _by_whom(port: int) -> str:
    try:
        holders = [
            c.pid for c in psutil.net_connections("tcp") if c.laddr and c.laddr[1] == port and c.status == "LISTEN"
        ]
        names = [f"{psutil.Process(pid).name()} (process {pid})" for pid in holders if pid]
    except psutil.Error:  # only root may look at everybody's sockets
        return ""
    return f" by {names[0]}" if names else ""
