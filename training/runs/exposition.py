"""Numbers as Prometheus reads them (its text format, 0.0.4), and a port that serves them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
REQUEST_SECONDS = 5.0
Labels = Mapping[str, str]


@dataclass(kw_only=True)
class Page:
    """One answer at /metrics. A name that ends in `_total` is a counter, any other a gauge."""

    _helps: dict[str, str] = field(default_factory=dict)
    _samples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, name: str, value: float, help: str, labels: Labels) -> None:
        self._helps.setdefault(name, help)
        shown = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
        self._samples.setdefault(name, []).append(f"{name}{{{shown}}} {float(value)!r}\n")

    def text(self) -> str:
        pieces = []
        for name, samples in self._samples.items():
            kind = "counter" if name.endswith("_total") else "gauge"
            pieces += [f"# HELP {name} {self._helps[name]}\n# TYPE {name} {kind}\n", *samples]
        return "".join(pieces)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


async def serve(address: str, port: int, text: Callable[[], str]) -> asyncio.Server:
    """Answer GET /metrics with `text()`, and everything else with 404; on any port if that one is taken."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _answer(reader, writer, text)

    try:
        return await asyncio.start_server(answer, address, port)
    except OSError:
        return await asyncio.start_server(answer, address, 0)


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, text: Callable[[], str]) -> None:
    with suppress(OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), REQUEST_SECONDS)
        is_found = head.startswith(b"GET /metrics ")
        body = text().encode() if is_found else b"only /metrics is here\n"
        status = "200 OK" if is_found else "404 Not Found"
        writer.write(
            f"HTTP/1.1 {status}\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: {len(body)}\r\n"
            "Connection: close\r\n\r\n".encode()
            + body
        )
        await writer.drain()
    writer.close()
