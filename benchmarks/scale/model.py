"""What one hour of a run asks of S3, by kind of object: pure functions of integers. docs/scale.md explains each term.

Prices: the list's for S3 Standard in us-east-1, https://aws.amazon.com/s3/pricing/. Deleting is free, and so are bytes
between S3 and machines of the same region. Storage is not in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

from training.cluster.agent import LOOK_SECONDS as PLACES_LOOK_SECONDS
from training.cluster.protocol import Timing
from training.runs.events import FLUSH_SECONDS
from training.runs.system import SAMPLE_SECONDS

HOUR = 3600
GET_NANODOLLARS = 400
"""$0.0004 for 1,000 GET, HEAD and others."""
PUT_NANODOLLARS = 5_000
"""$0.005 for 1,000 PUT, COPY, POST and LIST."""
LIST_PAGE = 1_000

# Seconds between two, from the code where the name can be imported cheaply.
POLL_SECONDS, RENEW_SECONDS = round(Timing().poll), round(Timing().renew)
FOLLOWERS_LOOKS = 2 * HOUR  # tasks.train: LOOK_SECONDS = 0.5
FOLLOWERS_SAMPLES_SECONDS = 10  # tasks.forward
BOOKMARK_SECONDS, BOOKMARK_BYTES = 5, 1_000  # tasks.follow

# Bytes as measured; tests/unit/test_scale_model.py compares them with what the code writes.
RECORD_BYTES, MEMBER_BYTES = 585, 96
JOB_BYTES, PLACE_BYTES, SAMPLE_BYTES = 1_400, 90, 310
LIST_ENTRY_BYTES = 350
STEP_BYTES = 230
LEDGER_BYTES = 29
"""Of a step's line: `"samples":"0123456789abcdef",`."""
PACE_BYTES, PACE_RANK_BYTES = 120, 22
TENSOR_HEADER_BYTES, TENSOR_BYTES, PART_BYTES = 110, 130, 130
"""In a part's header, and in the manifest."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run. A node is what fails and is replaced as one."""

    num_nodes: int
    ranks_per_node: int = 8
    steps_per_hour: int = 3_600
    checkpoints_per_hour: int = 6
    state_bytes: int = 16 << 30
    """Replicated: every rank holds all of it."""
    num_tensors: int = 1_000
    node_mtbf_hours: int = 5_696
    """Llama 3's (benchmarks/recovery/scenarios.py): 2,048 servers for 54 days, 466 interruptions."""
    change_milliseconds: int = 500
    """How long all stand still when the group changes."""
    start_looks: int = 10
    """How often a new agent looks for the others until it is in a group."""

    @property
    def num_ranks(self) -> int:
        return self.num_nodes * self.ranks_per_node


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Requests, and the bytes of their bodies."""

    num_gets: int = 0
    num_puts: int = 0
    num_lists: int = 0
    num_deletes: int = 0
    num_bytes_up: int = 0
    num_bytes_down: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def times(self, above: int, below: int = 1) -> Traffic:
        return Traffic(**{f.name: getattr(self, f.name) * above // below for f in fields(self)})

    @property
    def num_requests(self) -> int:
        return self.num_gets + self.num_puts + self.num_lists + self.num_deletes

    @property
    def num_bytes(self) -> int:
        return self.num_bytes_up + self.num_bytes_down

    @property
    def nanodollars(self) -> int:
        return GET_NANODOLLARS * self.num_gets + PUT_NANODOLLARS * (self.num_puts + self.num_lists)


def get(num_bytes: int) -> Traffic:
    return Traffic(num_gets=1, num_bytes_down=num_bytes)


def put(num_bytes: int) -> Traffic:
    return Traffic(num_puts=1, num_bytes_up=num_bytes)


def listing(num_keys: int) -> Traffic:
    """A second page makes the quick way give up, and the client begin anew (`Store.list_entries`)."""
    pages = -(-max(1, num_keys) // LIST_PAGE)
    again = Traffic(num_lists=1) if pages > 1 else Traffic()
    return Traffic(num_lists=pages, num_bytes_down=LIST_ENTRY_BYTES * num_keys) + again


def record_bytes(num_nodes: int) -> int:
    return RECORD_BYTES + MEMBER_BYTES * num_nodes


# ---- membership ------------------------------------------------------------------------------------------------------


def rest(run: Run) -> Traffic:
    """Every agent looks at the record; the first member leaves a sign of life in it."""
    size = record_bytes(run.num_nodes)
    return get(size).times(run.num_nodes * HOUR // POLL_SECONDS) + (get(size) + put(size)).times(HOUR // RENEW_SECONDS)


def look_for_places(num_nodes: int) -> Traffic:
    """One look of one agent."""
    return listing(num_nodes) + get(PLACE_BYTES).times(num_nodes)


def change(run: Run) -> Traffic:
    """One proposal, which all members read; whoever looks meanwhile looks for the others' places."""
    size = record_bytes(run.num_nodes)
    looks = look_for_places(run.num_nodes).times(
        run.num_nodes * run.change_milliseconds, round(1000 * PLACES_LOOK_SECONDS)
    )
    return get(size).times(run.num_nodes) + put(size) + looks


def arrival(run: Run) -> Traffic:
    """An agent begins: job, secret, its own place, those of the others."""
    size = record_bytes(run.num_nodes)
    return get(JOB_BYTES) + get(size) + put(PLACE_BYTES) + look_for_places(run.num_nodes).times(run.start_looks)


def start(run: Run) -> Traffic:
    """All agents, and the first group: not of every hour."""
    return arrival(run).times(run.num_nodes) + change(run)


def membership(run: Run) -> Traffic:
    """At rest, and for the nodes that are lost and replaced in an hour."""
    return rest(run) + (change(run).times(2) + arrival(run)).times(run.num_nodes, run.node_mtbf_hours)


# ---- samples and events ----------------------------------------------------------------------------------------------


def samples(run: Run) -> Traffic:
    """Each node's machine; a follower lists all, and asks each for the next until there is none."""
    written = put(SAMPLE_BYTES).times(run.num_nodes * HOUR // round(SAMPLE_SECONDS))
    read = listing(run.num_nodes) + (get(SAMPLE_BYTES) + get(0)).times(run.num_nodes)
    return written + read.times(HOUR // FOLLOWERS_SAMPLES_SECONDS)


def events(run: Run) -> Traffic:
    """A chunk a second at most, and one before each commit; one follower, which looks at the record too."""
    num_chunks = min(HOUR // round(FLUSH_SECONDS), run.steps_per_hour) + run.checkpoints_per_hour
    num_bytes = STEP_BYTES * run.steps_per_hour
    num_bytes += (PACE_BYTES + PACE_RANK_BYTES * run.num_ranks) * run.checkpoints_per_hour
    written = Traffic(num_puts=num_chunks, num_bytes_up=num_bytes)
    read = Traffic(num_gets=num_chunks, num_bytes_down=num_bytes)
    looks = (get(record_bytes(run.num_nodes)) + get(0)).times(FOLLOWERS_LOOKS)
    return written + read + looks + put(BOOKMARK_BYTES).times(HOUR // BOOKMARK_SECONDS)


def ledger(run: Run) -> Traffic:
    """No request of its own: what it adds to events, written and read."""
    num_bytes = LEDGER_BYTES * run.steps_per_hour
    return Traffic(num_bytes_up=num_bytes, num_bytes_down=num_bytes)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def manifest_bytes(run: Run, num_parts: int) -> int:
    return TENSOR_BYTES * run.num_tensors + PART_BYTES * num_parts


def parts_bytes(run: Run) -> int:
    return run.state_bytes + TENSOR_HEADER_BYTES * run.num_tensors


def commit(run: Run) -> Traffic:
    """A part of each rank and the manifest, read back; the record; and the one that it drops, object by object."""
    num_parts = run.num_ranks
    num_bytes = parts_bytes(run) + manifest_bytes(run, num_parts)
    size = record_bytes(run.num_nodes)
    objects = Traffic(num_puts=num_parts + 1, num_gets=num_parts + 1, num_bytes_up=num_bytes, num_bytes_down=num_bytes)
    dropped = Traffic(num_lists=1) + listing(num_parts + 1) + Traffic(num_deletes=num_parts + 1)
    return objects + get(size) + put(size) + dropped


def load(run: Run) -> Traffic:
    """By one rank, of all parts; after a loss of all memory every rank does so."""
    num_bytes = parts_bytes(run) + manifest_bytes(run, run.num_ranks)
    return Traffic(num_gets=run.num_ranks + 1, num_bytes_down=num_bytes) + get(record_bytes(run.num_nodes))


def checkpoints(run: Run) -> Traffic:
    return commit(run).times(run.checkpoints_per_hour)


Kind = Callable[[Run], Traffic]
KINDS: dict[str, Kind] = {
    "membership": membership,
    "samples": samples,
    "events": events,
    "ledger": ledger,
    "checkpoints": checkpoints,
}
