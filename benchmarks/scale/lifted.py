"""The same hour under the design that docs/scale.md proposes: nothing of it is built."""

from __future__ import annotations

from benchmarks.scale.model import (
    FOLLOWERS_SAMPLES_SECONDS,
    HOUR,
    LIST_PAGE,
    POLL_SECONDS,
    RECORD_BYTES,
    RENEW_SECONDS,
    SAMPLE_BYTES,
    Kind,
    Run,
    Traffic,
    events,
    get,
    ledger,
    listing,
    manifest_bytes,
    parts_bytes,
    put,
    record_bytes,
)

SLOW_POLL_SECONDS = 30
"""Of agents that hear of every newer token from others."""
NODES_PER_SAMPLER = 64
"""One agent writes the samples of so many."""
PART_TARGET_BYTES = 64 << 20


def membership(run: Run) -> Traffic:
    """The first member alone looks often; members lie in an object of their own, passed on by agents; places are in
    the keys of a listing."""
    polls = get(RECORD_BYTES).times(HOUR // POLL_SECONDS + run.num_nodes * HOUR // SLOW_POLL_SECONDS)
    signs = (get(RECORD_BYTES) + put(RECORD_BYTES)).times(HOUR // RENEW_SECONDS)
    change = get(RECORD_BYTES) + put(RECORD_BYTES) + put(record_bytes(run.num_nodes)) + get(RECORD_BYTES).times(2)
    arrival = get(RECORD_BYTES).times(2) + put(0) + listing(run.num_nodes)
    return polls + signs + (change.times(2) + arrival).times(run.num_nodes, run.node_mtbf_hours)


def samples(run: Run) -> Traffic:
    """Chunks of many nodes, found by one listing."""
    num_chunks = -(-run.num_nodes // NODES_PER_SAMPLER)
    size = SAMPLE_BYTES * NODES_PER_SAMPLER
    every = (put(size) + get(size)).times(num_chunks) + listing(num_chunks)
    return every.times(HOUR // FOLLOWERS_SAMPLES_SECONDS)


def num_parts(run: Run) -> int:
    """Large enough to be worth a request; a tensor may lie in several."""
    return min(run.num_ranks, -(-run.state_bytes // PART_TARGET_BYTES))


def checkpoints(run: Run) -> Traffic:
    """Few parts, deleted a thousand at a time."""
    count = num_parts(run)
    num_bytes = parts_bytes(run) + manifest_bytes(run, count)
    objects = Traffic(num_puts=count + 1, num_gets=count + 1, num_bytes_up=num_bytes, num_bytes_down=num_bytes)
    dropped = Traffic(num_lists=1) + listing(count + 1) + Traffic(num_deletes=1 + (count + 1) // LIST_PAGE)
    return (objects + get(RECORD_BYTES) + put(RECORD_BYTES) + dropped).times(run.checkpoints_per_hour)


def followed_events(run: Run) -> Traffic:
    """As they are, with a record that does not grow."""
    saved = (record_bytes(run.num_nodes) - RECORD_BYTES) * 2 * HOUR
    return events(run) + Traffic(num_bytes_down=-saved)


KINDS: dict[str, Kind] = {
    "membership": membership,
    "samples": samples,
    "events": followed_events,
    "ledger": ledger,
    "checkpoints": checkpoints,
}
