"""One part of what the reaper does, which outlives the server that it asks."""

from __future__ import annotations

import logging
from collections.abc import Callable

from training.errors import UnbrokenError

log = logging.getLogger("flows.reaper")


def attempt(part: str, work: Callable[[], None]) -> None:
    """Do one part's work; if a server is away, the settings are wrong or something stored is damaged, that is told, and
    the next look tries again."""
    from httpx import HTTPError

    try:
        work()
    except (UnbrokenError, HTTPError) as error:
        log.warning("%s could not be looked after: %s", part, error)
