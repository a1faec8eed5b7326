"""What a server answers over HTTP, for those who need no more than that."""

from __future__ import annotations

import urllib.request
from http.client import HTTPException


def fetch(request: str | urllib.request.Request, *, timeout: float, max_bytes: int = 16 << 20) -> bytes:
    """The body of the answer, or its first `max_bytes`. `timeout` is in seconds.

    Raises `urllib.error.HTTPError` for a refusal, and another `OSError` if there is no server, or one that does not
    speak HTTP.
    """
    try:
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            body: bytes = reply.read(max_bytes)
            return body
    except HTTPException as error:
        raise OSError(f"what listens there does not speak HTTP: {error!r}") from error
