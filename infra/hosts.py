"""Whose names a server answers to."""

from __future__ import annotations

from ipaddress import ip_address


def allowed_hosts(address: str) -> tuple[str, ...]:
    """What the Host of a request to `address` may be, as Starlette's TrustedHostMiddleware takes it. On loopback only
    what is loopback: a name that a web page has pointed there (DNS rebinding) would let the page ask in its reader's
    place."""
    return ("localhost", "127.0.0.1", "[::1]", address) if ip_address(address).is_loopback else ("*",)
