"""New data: when a watched preset's source has changed, and is quiet again, its pipeline is run."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from typing import TYPE_CHECKING
from uuid import UUID

from flows.deployments import deployment_of
from flows.reaper.attempt import attempt
from infra.settings import watched_presets
from infra.store import store_location
from tasks.stack import open_stack
from training.data.source import open_source, partitions
from training.documents import digest_of
from training.errors import UnbrokenError
from training.preset_file import load_preset

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

log = logging.getLogger(__name__)

NEW_DATA_TAG = "new-data"
LOOK_SECONDS = 10.0
MAX_SHARE = 0.1
"""Of the time, that is spent on listing sources: where that takes long, it is done less often."""


class Sources:
    """The sources of some presets. What was run for is Prefect's to remember, not ours: a flow run's idempotency key
    names the listing and the flow run before it, so that two reapers, or one that was killed, start one flow run for a
    change, and a source that goes back to what it was is run for once more."""

    def __init__(self, client: SyncPrefectClient) -> None:
        self._client = client
        self._seen: dict[str, str] = {}
        self._started: dict[str, str] = {}

    def look(self, presets: list[str]) -> None:
        """Look at each once, and start the pipeline of those whose listing is new, and the same as at the last look:
        nobody is writing there any more."""
        for preset in presets:
            try:
                listing = listing_digest(preset)
            except UnbrokenError as error:  # the others are looked at all the same
                if self._seen.get(preset) != str(error):
                    log.warning("the source of preset %s cannot be watched: %s", preset, error)
                self._seen[preset] = str(error)
                continue
            if self._seen.get(preset) == listing != self._started.get(preset):
                self._start(preset, listing)
                self._started[preset] = listing
            self._seen[preset] = listing

    def _start(self, preset: str, listing: str) -> None:
        deployment, key = deployment_of(self._client, preset), f"{NEW_DATA_TAG} {preset} {listing}"
        last = self._last_run(deployment.id, preset)
        if last is not None and (last.idempotency_key or "").startswith(key):
            return
        run = self._client.create_flow_run_from_deployment(
            deployment.id,
            parameters={"preset": preset},
            tags=[NEW_DATA_TAG],
            idempotency_key=key if last is None else f"{key} after {last.id}",
        )
        log.info("the source of preset %s is at %s: flow run %s", preset, listing[:12], run.name)

    def _last_run(self, deployment_id: UUID, preset: str) -> FlowRun | None:
        """The newest that was started so for this preset, of those that Prefect still has."""
        from prefect.client.schemas import filters
        from prefect.client.schemas.sorting import FlowRunSort

        found = self._client.read_flow_runs(
            flow_run_filter=filters.FlowRunFilter(
                deployment_id=filters.FlowRunFilterDeploymentId(any_=[deployment_id]),
                tags=filters.FlowRunFilterTags(all_=[NEW_DATA_TAG]),
            ),
            sort=FlowRunSort.EXPECTED_START_TIME_DESC,
        )
        ours = (run for run in found if run.parameters.get("preset") == preset)
        return max(ours, key=lambda run: str(run.created), default=None)


def watch_sources() -> None:
    """Look at the sources of the presets that the settings name, for ever. In a thread: a listing may take long."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        sources = Sources(client)
        while True:
            begun = time.monotonic()
            attempt("the sources", lambda: sources.look(watched_presets()))
            time.sleep(max(LOOK_SECONDS, (time.monotonic() - begun) / MAX_SHARE))


def listing_digest(preset: str) -> str:
    """Changes whenever a file of the preset's source does: names, sizes, and times or ETags. Nothing is read.

    Raises `UserError` for a wrong preset or source, `InfrastructureError` if the source's store is away.
    """
    config = load_preset(preset)
    source = open_source(config.data, folder=config.folder, location=store_location(open_stack()[0]))
    return digest_of([asdict(config.data), [asdict(part) for part in partitions(source, config.data)]])
