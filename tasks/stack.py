"""Where the stages find the stack. Imports no Prefect: its settings are read at import, so they must be set before."""

from __future__ import annotations

from infra.settings import Settings, activate, load_settings
from infra.store import store_location
from training.s3.objectstore import Store


def open_stack() -> tuple[Settings, Store]:
    """The stack's settings (put into the environment, where every library finds them) and its object store."""
    settings = load_settings()
    activate(settings)
    return settings, Store(store_location(settings))
