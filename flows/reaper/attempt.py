"""One part of what the reaper does, which outlives the server that it asks."""

from __future__ import annotations

import logging
from collections.abc import Callable

from training.errors import InfrastructureError, UserError

log = logging.getLogger("flows.reaper")


def attempt(part: str, work: Callable[[], None]) -> None:
    """Do one part's work; if a server is away, or the settings are wrong, the next look makes up for it."""
    from httpx import HTTPError

    try:
        work()
    except (InfrastructureError, UserError, HTTPError) as error:
        log.warning("%s could not be looked after: %s", part, error)
