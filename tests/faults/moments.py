"""The moments of a checkpoint, as a proxy before the store sees them go by."""

from __future__ import annotations

from collections.abc import Callable

from tests.faults.proxy import LosingProxy


def call_at(proxy: LosingProxy, request: tuple[str, str, int], act: Callable[[], None], *, step: int) -> None:
    """Once: at the first such request (method, part of its path, status) after that step's part was sent."""
    method, name, status = request
    sent, done = False, False

    def watch(found_method: str, path: str, found_status: int) -> None:
        nonlocal sent, done
        sent |= f"{step:08d}-" in path
        if not done and sent and (found_method, found_status) == (method, status) and name in path:
            done = True
            act()

    proxy.watch = watch


MOMENTS = {
    "the part is sent": ("PUT", "/part-0", 0),
    "the part is read back": ("GET", "/part-0", 0),
    "the manifest is sent": ("PUT", "/manifest", 0),
    "the manifest is read back": ("GET", "/manifest", 0),
    "the manifest was read back": ("GET", "/manifest", 200),
    "the record is replaced": ("PUT", "/record", 0),
}
AFTER_COMMIT = ("PUT", "/record", 200)
