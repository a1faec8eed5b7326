"""Clients that ask without a pause, each over one kept-alive connection: `python -m benchmarks.serving.load`.

A process of its own, which spends as little as it can: it looks at the status and the length of an answer alone.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path


async def _client(port: int, request: bytes, until: float, found: list[float]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while (began := time.perf_counter()) < until:
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        lines = head.lower().split(b"\r\n")
        length = next(int(line[15:]) for line in lines if line.startswith(b"content-length:"))
        body = await reader.readexactly(length)
        if b" 200 " not in lines[0]:
            raise RuntimeError(f"{lines[0].decode()}: {body[:200].decode()}")
        found.append(time.perf_counter() - began)
    writer.close()


async def _all(port: int, request: bytes, num_clients: int, seconds: float) -> list[float]:
    found: list[float] = []
    until = time.perf_counter() + seconds
    await asyncio.gather(*(_client(port, request, until, found) for _ in range(num_clients)))
    return found


def main() -> None:
    port, num_clients, seconds, body = sys.argv[1:]
    data = Path(body).read_bytes()
    head = (
        "POST /invocations HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    print(json.dumps(asyncio.run(_all(int(port), head.encode() + data, int(num_clients), float(seconds)))))


if __name__ == "__main__":
    main()
