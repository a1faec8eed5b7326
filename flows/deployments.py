"""Which deployment runs a preset."""

from __future__ import annotations

from typing import TYPE_CHECKING

from training.errors import InfrastructureError
from training.preset_file import PRESETS

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.responses import DeploymentResponse


def deployment_of(client: SyncPrefectClient, preset: str) -> DeploymentResponse:
    """A built-in preset has its own. Raises `InfrastructureError` if Prefect does not know it."""
    from prefect.exceptions import ObjectNotFound

    name = f"pipeline/{preset if (PRESETS / f'{preset}.toml').exists() else 'custom'}"
    try:
        return client.read_deployment_by_name(name)
    except ObjectNotFound as error:
        raise InfrastructureError(f"Prefect has no deployment {name!r}: `unbroken up` registers it") from error
