"""S3 requests and the bytes of their bodies, counted on their way by kind of object."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import unquote

from tests.faults.proxy import LosingProxy, _Reply

KINDS = ("record", "jobs", "nodes", "system", "events", "checkpoints")
"""Parts of an object's key (docs/protocols.md)."""
REFUSED = 412


class Count(NamedTuple):
    """Of one kind."""

    num_requests: int = 0
    num_bytes: int = 0
    """Of bodies, whichever way they went."""


Counts = Mapping[str, Count]
"""By kind and method: `record GET`."""


def name_of(method: str, path: str, status: int) -> str:
    """A refused condition is a request that is paid like any other, and shown for itself."""
    path = unquote(path)
    kind = next((kind for kind in KINDS if f"/{kind}" in path), "other")
    method = "LIST" if "list-type=2" in path else method
    return f"{kind} {method}{' refused' if status == REFUSED else ''}"


def since(before: Counts, after: Counts) -> dict[str, Count]:
    """What came meanwhile, without what did not."""
    new = {name: Count(*(b - a for a, b in zip(before.get(name, Count()), after[name], strict=True))) for name in after}
    return {name: count for name, count in sorted(new.items()) if count.num_requests}


class CountingProxy(LosingProxy):
    """Loses nothing."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(endpoint)
        self._server.handle_error = lambda request, address: None  # type: ignore[assignment, method-assign]  # killed agents
        self._counting = threading.Lock()
        self._counts: dict[str, Count] = {}

    def __enter__(self) -> CountingProxy:
        super().__enter__()
        return self

    def counts(self) -> Counts:
        """Since it began."""
        with self._counting:
            return dict(self._counts)

    def _forward(self, method: str, path: str, headers: list[tuple[str, str]], body: bytes) -> _Reply:
        reply = super()._forward(method, path, headers, body)
        name = name_of(method, path, reply.status)
        with self._counting:
            before = self._counts.get(name, Count())
            self._counts[name] = Count(before.num_requests + 1, before.num_bytes + len(body) + len(reply.body))
        return reply
